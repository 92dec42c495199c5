"""The rules: each says in a few lines which runs of keys a query sees. Join them with & and |.

    causal(B, S) & document(ids)                              packed language modelling
    sliding_window(B, S, 4096) & document(ids)                Mistral, gpt-oss
    chunked(positions, 8192) & causal(B, S) & document(ids)   Llama 4
    (prefix_lm(positions, lengths) | causal(B, S)) & document(ids)

Every rule costs O(S K), or O(S log S) where it looks documents up by number.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import torch
from torch import Tensor

from sightline.masks.intervals import document_starts, find_runs, segment_bounds
from sightline.masks.mask import AttentionMask

__all__ = [  # noqa: RUF022  # in the order in which errors and help name them
    "causal",
    "document",
    "sliding_window",
    "chunked",
    "prefix_lm",
    "bidirectional",
    "global_tokens",
    "shared_prefix",
    "prefix_tree",
    "block_diffusion",
    "and_masks",
    "or_masks",
]
"""The rules: what `sightline.masks` exports and mask expressions on the command line may call."""


def causal(batch_size: int, length: int, *, device: torch.device | str = "cpu") -> AttentionMask:
    """A token sees itself and all before it: `kv <= q`."""
    stop = torch.arange(1, length + 1, dtype=torch.int32, device=device).expand(batch_size, length)
    return _single(torch.zeros_like(stop), stop, length)


def document(document_ids: Tensor, key_document_ids: Tensor | None = None) -> AttentionMask:
    """A token sees all tokens of its own document, in both directions; a token numbered below 0 (padding) sees nothing.

    document_ids      int [B, Q]
    key_document_ids  int [B, T] for cross-attention, where keys are other tokens than queries: a query sees the keys
                      that carry its document's number. Default: the queries are the keys.
    """
    keys = document_ids if key_document_ids is None else key_document_ids
    _check_facts("document", document_ids=document_ids)
    _check_facts("document", key_document_ids=keys)
    if keys.shape[0] != document_ids.shape[0]:
        raise ValueError(f"document: {document_ids.shape[0]} rows of queries but {keys.shape[0]} rows of keys")
    return AttentionMask(*find_runs(keys, document_ids), keys.shape[1])


def sliding_window(batch_size: int, length: int, window: int, *, device: torch.device | str = "cpu") -> AttentionMask:
    """A token sees `window` tokens, itself included and none after it: `q - window < kv <= q`."""
    if window < 1:
        raise ValueError(f"a window counts the keys a token sees, itself included, so it is at least 1; got {window}")
    stop = torch.arange(1, length + 1, dtype=torch.int32, device=device).expand(batch_size, length)
    return _single((stop - window).clamp(min=0), stop, length)


def chunked(positions: Tensor, chunk: int) -> AttentionMask:
    """A token sees its own chunk, in both directions: tokens of one document with equal `positions // chunk`.

    positions: int [B, S], position inside the document; a document begins where a position does not follow the last.
    """
    _check_facts("chunked", positions=positions)
    if chunk < 1:
        raise ValueError(f"a chunk holds at least 1 token, got {chunk}")
    number = positions // chunk
    begins = document_starts(positions)
    begins[:, 1:] |= number[:, 1:] != number[:, :-1]
    return _single(*segment_bounds(begins), positions.shape[1])


def prefix_lm(positions: Tensor, prefix_lengths: Tensor) -> AttentionMask:
    """A token sees the prefix of its own document: the keys whose position is under the document's prefix length.

    positions       int [B, S], position inside the document; a document begins where one does not follow the last
    prefix_lengths  int [B, S], the prefix length of the token's document, 0 where it has none
    Join with `| causal(...)` for what follows the prefix and `& document(...)` for padding.
    """
    _check_facts("prefix_lm", positions=positions, prefix_lengths=prefix_lengths)
    first, end = segment_bounds(document_starts(positions))
    index = torch.arange(positions.shape[1], dtype=torch.int32, device=positions.device)
    # The document's position 0 lies at index - position, which for a carried-over document is before the row.
    stop = torch.minimum(index - positions + prefix_lengths, end).to(torch.int32)
    return _single(first, stop, positions.shape[1])


def bidirectional(span_ids: Tensor) -> AttentionMask:
    """Tokens of one span (an image's patches) see each other, in both directions; -1 is in no span and sees nothing.

    span_ids: int [B, S]. Join with `| causal(...)` for the text around and `& document(...)`.
    """
    _check_facts("bidirectional", span_ids=span_ids)
    return AttentionMask(*find_runs(span_ids, span_ids), span_ids.shape[1])


def global_tokens(is_global: Tensor) -> AttentionMask:
    """Everyone sees the global tokens and they see everyone. K = the runs of global tokens in a row.

    is_global: bool [B, S]. Join with `| sliding_window(...)` and `& document(...)`.
    """
    _check_facts("global_tokens", is_global=is_global)
    length = is_global.shape[1]
    flags = is_global.to(torch.int32)
    start, stop = find_runs(flags, torch.ones_like(flags))
    everything = torch.where(is_global, length, 0).to(torch.int32)
    return AttentionMask(start, stop, length) | _single(torch.zeros_like(everything), everything, length)


def shared_prefix(document_ids: Tensor, prefix_ids: Tensor) -> AttentionMask:
    """A token sees its own document and the document `prefix_ids` names: its prompt.

    One prompt and its many responses lie in a row as documents; each response names the prompt, so the prompt is
    computed once (DPO pairs, grouped rollouts). Join with `& causal(...)`.

    document_ids  int [B, S], -1 is padding
    prefix_ids    int [B, S], number of the document this one continues; its own number where it continues nothing
    """
    _check_facts("shared_prefix", document_ids=document_ids, prefix_ids=prefix_ids)
    prefix_ids = torch.where(document_ids < 0, document_ids, prefix_ids)
    return document(document_ids) | document(prefix_ids, document_ids)


def prefix_tree(document_ids: Tensor, parent_ids: Tensor) -> AttentionMask:
    """A token sees its own document and all that this one continues, up to the root: shared prefixes of any depth.

    document_ids  int [B, S], -1 is padding
    parent_ids    int [B, S], number of the document this one continues; its own number at a root
    K = the depth of the tree, less where a document lies right behind its parent. Join with `& causal(...)`.
    Errors: ValueError when parents run in a circle or name a document that is not in the row.
    """
    _check_facts("prefix_tree", document_ids=document_ids, parent_ids=parent_ids)
    real = document_ids >= 0
    mask = document(document_ids)
    ancestor = torch.where(real, parent_ids, -1)
    while True:
        step = document(ancestor, document_ids)
        if bool(((step.stop <= step.start).all(dim=2) & real).any()):
            raise ValueError("parent_ids name a document that is not in the row; a root names itself")
        # The ancestor's own parent stands at any of its tokens, for instance its first.
        parent = torch.where(real, parent_ids.gather(1, step.start[..., 0].long()), -1)
        joined = mask | step
        if joined.equal(mask):  # only ancestors met before: roots, or a circle
            if not torch.equal(parent, ancestor):
                raise ValueError("parent_ids run in a circle; a root names itself, and every document leads to one")
            return mask
        mask, ancestor = joined, parent


def block_diffusion(document_ids: Tensor, clean_ids: Tensor, positions: Tensor, block: int) -> AttentionMask:
    """Block diffusion: a token sees its own block, in both directions, and all blocks before it of the clean copy.

    A row holds every document twice: noisy and clean. A noisy block sees itself and the clean blocks before it; a
    clean block sees itself and the clean blocks before it (Arriola et al. 2025, arXiv:2503.09573, section 3).

    document_ids  int [B, S], noisy and clean copies are documents of their own; -1 is padding
    clean_ids     int [B, S], number of the document's clean copy; a clean copy names itself
    positions     int [B, S], position inside the copy, from 0
    """
    _check_facts("block_diffusion", document_ids=document_ids, clean_ids=clean_ids, positions=positions)
    own_block = chunked(positions, block) & document(document_ids)
    clean = document(torch.where(document_ids < 0, document_ids, clean_ids), document_ids)
    if clean.intervals > 1:
        raise ValueError("block_diffusion: a clean copy must lie in one piece, but a number stands in several places")
    start, end = clean.start[..., 0], clean.stop[..., 0]
    before = (positions // block) * block - positions.gather(1, start.long())  # clean tokens before this block
    return own_block | _single(start, torch.minimum(start + before, end), clean.key_length)


def and_masks(*masks: AttentionMask) -> AttentionMask:
    """What all masks show."""
    return functools.reduce(operator.and_, _at_least_one(masks, "and_masks"))


def or_masks(*masks: AttentionMask) -> AttentionMask:
    """What any of the masks shows."""
    return functools.reduce(operator.or_, _at_least_one(masks, "or_masks"))


def _at_least_one(masks: tuple[AttentionMask, ...], name: str) -> tuple[AttentionMask, ...]:
    if not masks:
        raise ValueError(f"{name} needs at least one mask, got none")
    return masks


def _single(start: Tensor, stop: Tensor, key_length: int) -> AttentionMask:
    """A mask of one interval a query: integers [B, Q] each, empty where stop <= start."""
    return AttentionMask.from_intervals(start.unsqueeze(2), stop.unsqueeze(2), key_length)


def _check_facts(rule: str, **facts: Tensor) -> None:
    """Facts about tokens are [B, S] integers or flags, all of one shape."""
    shape = next(iter(facts.values())).shape
    for name, value in facts.items():
        if value.dim() != 2 or value.is_floating_point():
            raise ValueError(f"{rule}: {name} must be integers [B, S], got {value.dtype} {tuple(value.shape)}")
        if value.shape != shape:
            raise ValueError(f"{rule}: {name} is {tuple(value.shape)}, the other facts are {tuple(shape)}")


RULES: dict[str, Callable[..., AttentionMask]] = {name: globals()[name] for name in __all__}
"""Every rule by its name."""
