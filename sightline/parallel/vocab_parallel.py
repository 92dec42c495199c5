"""Embedding, logits and loss with the vocabulary sharded across ranks: each rank has the weights of V / n tokens."""

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
    """Forward of a vocabulary-parallel embedding: tokens int64 [B, S] -> [B, S, W], replicated.

    Each rank looks up the tokens of its shard and gives zeros for the others; an all-reduce sums the results.
    """
    rows = embedding.weight.shape[0]
    local = tokens - mesh.get_local_rank() * rows
    remote = (local < 0) | (local >= rows)
    h = F.embedding(local.masked_fill(remote, 0), embedding.weight).masked_fill(remote[..., None], 0)
    return redistribute(h, mesh, Partial(), Replicate())


def logits(mesh: DeviceMesh, h: Tensor, weight: Tensor) -> Tensor:
    """h [..., W], weight [V / n, W] -> logits [..., V] of the full vocabulary, on every rank."""
    h = redistribute(h, mesh, Replicate(), Replicate(), gradient=Partial())
    return redistribute(F.linear(h, weight), mesh, Shard(h.dim() - 1), Replicate())


def token_losses(
    mesh: DeviceMesh, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int = CHUNK_SIZE, **options: Any
) -> Tensor:
    """Return `linear_cross_entropy` over a sharded vocabulary: the same losses on every rank.

    hidden   [N, W], replicated
    weight   [V / n, W], the local shard
    labels   int64 [N], replicated
    options  token_weights and reduction, as in `linear_cross_entropy`

    Each rank materializes logits for one chunk of tokens and its shard of the vocabulary at a time. Per token, the
    forward gathers three numbers from each rank, and the backward all-reduces the gradient of `hidden`.
    """
    vocab_size = mesh.size() * weight.shape[0]
    hidden = redistribute(hidden, mesh, Replicate(), Replicate(), gradient=Partial())
    options |= {"vocab_size": vocab_size, "losses_to_grads": functools.partial(losses_to_grads, mesh)}
    return linear_cross_entropy(hidden, weight, labels, chunk_size, **options)


def losses_to_grads(mesh: DeviceMesh, logits: Tensor, label: Tensor) -> Tensor:
    """Return the loss of each token [C] and overwrite the local logits [C, V / n] with their gradient.

    -log softmax[label] = max - logit[label] + log sum(exp(logits - max)). The sum is at least 1, so its log is exact
    even for an unlikely label, as in `sightline.layers.loss.losses_to_grads`.
    """
    rows = torch.arange(len(label), device=label.device)
    local_label = label - mesh.get_local_rank() * logits.shape[1]
    remote = (local_label < 0) | (local_label >= logits.shape[1])
    local_label = local_label.masked_fill(remote, 0)
    # Per token, from each rank: the greatest local logit, sum(exp(logits - greatest)), and the label's logit or 0.
    local_max = logits.amax(dim=1)
    label_logit = logits[rows, local_label].masked_fill(remote, 0)
    logits.sub_(local_max[:, None]).exp_()
    local_stats = torch.stack([local_max, logits.sum(dim=1), label_logit])
    stats = redistribute(local_stats[None], mesh, Shard(0), Replicate())  # [n, 3, C]
    global_max = stats[:, 0].amax(dim=0)
    total = (stats[:, 1] * (stats[:, 0] - global_max).exp()).sum(dim=0)
    logits *= ((local_max - global_max).exp() / total)[:, None]
    logits[rows, local_label] -= (~remote).to(logits.dtype)
    return global_max - stats[:, 2].sum(dim=0) + total.log()
