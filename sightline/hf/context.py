"""context_parallel(): divide packed rows among the ranks of a group, for a model of transformers.

Each rank runs the model on its part of the tokens of every row. Attention layers receive the keys of other ranks that
their queries attend to, which is exact for any mask: documents, windows, chunks, and trees of shared prefixes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.batch import IGNORE, PADDING
from sightline.hf.calls import transformers_model
from sightline.hf.divisible import check_divisible
from sightline.hf.documents import CONTEXT, Documents
from sightline.hf.forward import ADDED, GIVEN, documents_of_call
from sightline.hf.layer_masks import build_masks, layer_types
from sightline.hf.positions import check_divided_positions
from sightline.hf.running import set_documents
from sightline.masks import AttentionMask
from sightline.parallel.context.exchange import ContextExchange
from sightline.parallel.context.plan import plan_context

DOCUMENTS = {*ADDED, *GIVEN, "max_length_q", "max_length_k", "attention_mask"} - {"position_ids"}
"""Arguments that say where documents lie; the masks of the local tokens take their place."""
PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "shift_labels")
"""Arguments with one element for each token."""


class LocalTokens(dict[str, Any]):
    """Keyword arguments of a model for the tokens of this rank.

    index  int64 [B, S / ranks], ascending: the tokens of each row that this rank has. Indices from S on are padding
           that was added so that S is divisible by the number of ranks
    """

    index: Tensor


@contextmanager
def context_parallel(model: nn.Module, group: dist.ProcessGroup, batch: Mapping[str, Any]) -> Iterator[LocalTokens]:
    """Yield the keyword arguments for this rank's part of packed rows; the model must be called inside the block.

    All ranks of `group` must call it with the same rows. Afterwards the sum of their losses is the loss of the rows,
    and the sum of their gradients is its gradient. `loss.backward()` may run outside of the block.

    model  enabled by `sightline.hf.enable`
    batch  keyword arguments for full rows, at least input_ids [B, S] or inputs_embeds [B, S, D], and position_ids;
           labels [B, S], or shift_labels [B, S] whose element i is the label of what token i predicts; and anything
           that states documents, as `enable` describes. num_items_in_batch is the number of labels that the loss is
           divided by: those of these rows by default

    Raises:
        ValueError: if the model is not enabled or has layers that need all tokens of a row, the ranks have different
            rows, or the batch has arguments that cannot be divided.
    """
    documents = _find_documents(batch)
    length = documents.ids.shape[1]
    check_divisible(model, batch, length)
    check_divided_positions(transformers_model(model), batch["position_ids"])
    masks = build_masks(model, documents) if documents.masks is None else documents.masks
    types = layer_types(model)
    if missing := sorted(set(types) - set(masks)):
        raise ValueError(f"attention_masks has no mask for layers of type {', '.join(missing)}; it has {sorted(masks)}")
    full = _inputs_of_rows(batch, documents.ids.shape)
    padding = -length % group.size()
    masks = {name: _pad_mask(masks[name], padding) for name in types}
    _check_same_rows(full, masks, group)

    plan = plan_context(masks, group.size(), layers=types)
    index = plan.queries(group.rank())
    ids = F.pad(documents.ids, (0, padding), value=PADDING).gather(1, index)
    shards = {name: plan.shard(group.rank(), name) for name in masks}
    with set_documents(Documents(ids, CONTEXT, masks=shards, exchanges=ContextExchange(group))):
        yield _local_tokens(full, index, length)


def _find_documents(batch: Mapping[str, Any]) -> Documents:
    """Return the documents of the full rows."""
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"context_parallel cannot divide an attention_mask of shape {list(mask.shape)}; expected [B, S], or an "
            "AttentionMask as attention_masks"
        )
    if batch.get("past_key_values") is not None or batch.get("use_cache"):
        raise ValueError("context_parallel fills no cache; pass use_cache=False and no past_key_values")
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor):
        raise ValueError(
            "context_parallel needs position_ids [B, S]: the model cannot infer them from a part of the tokens. "
            "sightline.hf.PackedCollator states them; for rows of one document use torch.arange(S).expand(B, S)"
        )
    documents = documents_of_call(dict(batch), {name: batch[name] for name in ADDED if name in batch})
    if documents is None:
        raise ValueError(f"context_parallel needs input_ids [B, S] or inputs_embeds [B, S, D], got {sorted(batch)}")
    return documents


def _inputs_of_rows(batch: Mapping[str, Any], shape: torch.Size) -> dict[str, Any]:
    """Return the keyword arguments of the model for full rows, without those that state documents."""
    full = {name: value for name, value in batch.items() if name not in DOCUMENTS and value is not None}
    positions, labels = full["position_ids"], full.pop("labels", None)
    if labels is not None and "shift_labels" not in full:
        full["shift_labels"] = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    if "shift_labels" in full:
        full.setdefault("num_items_in_batch", (full["shift_labels"] != IGNORE).sum())
    rest = {name: value for name, value in full.items() if name not in PER_TOKEN}
    unknown = [name for name, value in rest.items() if isinstance(value, Tensor) and value.dim()]
    if unknown or full.get("logits_to_keep"):
        raise ValueError(
            f"context_parallel cannot divide {', '.join(unknown) or 'logits_to_keep'} among ranks; expected arguments "
            f"with one element for each token: {', '.join(PER_TOKEN)}, labels. Images belong to whole rows: embed them "
            "first, and pass inputs_embeds in place of input_ids"
        )
    return {**full, "use_cache": False, "position_ids": positions.expand(*positions.shape[:-2], *shape)}


def _local_tokens(full: dict[str, Any], index: Tensor, length: int) -> LocalTokens:
    """Return the elements of the tokens `index`; padding, from `length` on, repeats the last token without a label."""
    local = LocalTokens(full, **{CONTEXT: True})
    local.index = index
    for name in PER_TOKEN:
        if name not in full:
            continue
        value = full[name]
        tokens = index.clamp(max=length - 1).to(value.device)
        if name == "inputs_embeds":
            local[name] = value[torch.arange(len(tokens), device=value.device)[:, None], tokens]
        else:
            local[name] = value.gather(-1, tokens.expand(*value.shape[:-1], -1))
    if "shift_labels" in local:
        is_padding = (index >= length).to(local["shift_labels"].device)
        local["shift_labels"] = local["shift_labels"].masked_fill(is_padding, IGNORE)
        local["labels"] = local["shift_labels"]  # models compute a loss only if there are labels
    return local


def _pad_mask(mask: AttentionMask, padding: int) -> AttentionMask:
    """Return the mask of rows with `padding` more tokens, which attend to nothing."""
    if not padding:
        return mask
    start, stop = (F.pad(bound, (0, 0, 0, padding)) for bound in (mask.start, mask.stop))
    return AttentionMask.from_intervals(start, stop, mask.key_length + padding)


def _check_same_rows(full: dict[str, Any], masks: Mapping[str, AttentionMask], group: dist.ProcessGroup) -> None:
    """Check on every rank that all ranks have the same rows and masks, by a checksum.

    Raises:
        ValueError: if they do not.
    """
    inputs = [full[name] for name in PER_TOKEN if name in full and not full[name].is_floating_point()]
    bounds = [bound for name in sorted(masks) for bound in (masks[name].start, masks[name].stop)]
    checksum = _checksum(inputs) + _checksum(bounds).to(inputs[0].device)
    of_ranks = [torch.empty_like(checksum) for _ in range(group.size())]
    dist.all_gather(of_ranks, checksum, group=group)
    different = [rank for rank, other in enumerate(of_ranks) if not torch.equal(other, of_ranks[0])]
    if different:
        raise ValueError(
            f"ranks {different} of the context-parallel group have other rows than rank 0: give the same batch to "
            "each rank of a group, for example with DistributedSampler(num_replicas=number of groups, rank=index of "
            "the group)"
        )


def _checksum(tensors: list[Tensor]) -> Tensor:
    """Return a number that depends on all elements, their places and the shapes: int64 []."""
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        weights = torch.arange(1, tensor.numel() + 1, device=tensor.device)
        total = total * 1_000_003 + (tensor.flatten().long() * weights).sum() + tensor.shape[-1]
    return total
