"""The two ends of a model whose vocabulary is cut: each process has the rows of some tokens' weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard

from sightline.layers import linear_cross_entropy
from sightline.layers.loss import CHUNK_SIZE
from sightline.parallel.redistribute import redistribute


def embed_tokens(embedding: nn.Embedding, mesh: DeviceMesh, tokens: Tensor) -> Tensor:
    """The forward of an embedding: int64 [B, S] -> [B, S, W], the whole on every process.

    Each looks up its own tokens and has zeros for the others, so the sum over all processes is the whole.
    """
    rows = embedding.weight.shape[0]
    own = tokens - mesh.get_local_rank() * rows
    foreign = (own < 0) | (own >= rows)
    h = F.embedding(own.masked_fill(foreign, 0), embedding.weight).masked_fill(foreign[..., None], 0)
    return redistribute(h, mesh, Partial(), Replicate())


def logits(mesh: DeviceMesh, h: Tensor, weight: Tensor) -> Tensor:
    """h [..., W], weight [V / n, W] -> [..., V] of the whole vocabulary, on every process."""
    h = redistribute(h, mesh, Replicate(), Replicate(), gradient=Partial())
    return redistribute(F.linear(h, weight), mesh, Shard(h.dim() - 1), Replicate())


def token_losses(
    mesh: DeviceMesh, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int = CHUNK_SIZE, **options: Any
) -> Tensor:
    """`linear_cross_entropy` with this process's part of the vocabulary: the same losses on every process.

    hidden [N, W] and labels [N] are whole, weight [V / n, W] is its part. Logits exist for a chunk of tokens and a part
    of the vocabulary at a time; of each token, three numbers travel in the forward and its gradient in the backward.

    options  token_weights and reduction, as in `linear_cross_entropy`
    """
    vocab_size = mesh.size() * weight.shape[0]
    hidden = redistribute(hidden, mesh, Replicate(), Replicate(), gradient=Partial())
    options |= {"vocab_size": vocab_size, "losses_to_grads": functools.partial(losses_to_grads, mesh)}
    return linear_cross_entropy(hidden, weight, labels, chunk_size, **options)


def losses_to_grads(mesh: DeviceMesh, logits: Tensor, label: Tensor) -> Tensor:
    """The loss of each token [C]; this process's logits [C, V / n] become their gradient, in place.

    -log softmax[label] = max - logit[label] + log sum(exp(logits - max)). The sum is at least 1, as in the function
    that this one stands for, so its log is exact however unlikely the label.
    """
    rows = torch.arange(len(label), device=label.device)
    own = label - mesh.get_local_rank() * logits.shape[1]
    foreign = (own < 0) | (own >= logits.shape[1])
    own = own.masked_fill(foreign, 0)
    # What each process knows of a token: its greatest logit, the sum of exp above that, the label's logit or 0.
    greatest = logits.amax(dim=1)
    of_label = logits[rows, own].masked_fill(foreign, 0)
    logits.sub_(greatest[:, None]).exp_()
    known = torch.stack([greatest, logits.sum(dim=1), of_label])
    all_known = redistribute(known[None], mesh, Shard(0), Replicate())  # [n, 3, C]
    greatest_of_all = all_known[:, 0].amax(dim=0)
    total = (all_known[:, 1] * (all_known[:, 0] - greatest_of_all).exp()).sum(dim=0)
    logits *= ((greatest - greatest_of_all).exp() / total)[:, None]
    logits[rows, own] -= (~foreign).to(logits.dtype)
    return greatest_of_all - all_known[:, 2].sum(dim=0) + total.log()
