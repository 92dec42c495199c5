"""Mask rules. Each returns an AttentionMask; combine them with & (intersection) and | (union).

    causal(B, S) & document(ids)                              packed language modeling
    sliding_window(B, S, 4096) & document(ids)                Mistral, gpt-oss
    chunked(positions, 8192) & causal(B, S) & document(ids)   Llama 4
    (prefix_lm(positions, lengths) | causal(B, S)) & document(ids)

Every rule costs O(S K), or O(S log S) if it looks up documents by id.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import torch
from torch import Tensor

from sightline.masks.intervals import document_starts, find_runs, segment_bounds
from sightline.masks.mask import AttentionMask

__all__ = [  # noqa: RUF022  # the order in errors and help texts
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
"""The rules, exported by `sightline.masks` and callable in mask expressions on the command line."""


def causal(batch_size: int, length: int, *, device: torch.device | str = "cpu") -> AttentionMask:
    """Causal mask: each query attends to itself and to all earlier keys, `kv <= q`."""
    stop = torch.arange(1, length + 1, dtype=torch.int32, device=device).expand(batch_size, length)
    return _single(torch.zeros_like(stop), stop, length)


def document(document_ids: Tensor, key_document_ids: Tensor | None = None) -> AttentionMask:
    """Document mask: each query attends to all keys of its document, in both directions. Combine with `& causal(...)`.

    document_ids      int [B, Q], document of each query; negative: padding, which is fully masked
    key_document_ids  int [B, T], document of each key, for cross-attention; default: `document_ids`
    """
    keys = document_ids if key_document_ids is None else key_document_ids
    _check_token_tensors("document", document_ids=document_ids)
    _check_token_tensors("document", key_document_ids=keys)
    if keys.shape[0] != document_ids.shape[0]:
        raise ValueError(
            f"document: got {document_ids.shape[0]} rows of queries but {keys.shape[0]} rows of keys; expected equal"
        )
    return AttentionMask(*find_runs(keys, document_ids), keys.shape[1])


def sliding_window(batch_size: int, length: int, window: int, *, device: torch.device | str = "cpu") -> AttentionMask:
    """Causal sliding window: each query attends to the last `window` keys, itself included, `q - window < kv <= q`."""
    if window < 1:
        raise ValueError(
            f"sliding_window: window counts keys, the query included, and must be at least 1; got {window}"
        )
    stop = torch.arange(1, length + 1, dtype=torch.int32, device=device).expand(batch_size, length)
    return _single((stop - window).clamp(min=0), stop, length)


def chunked(positions: Tensor, chunk: int) -> AttentionMask:
    """Chunked attention: each query attends to the keys of its chunk, in both directions. Combine with `& causal(...)`.

    Tokens of a document are in the same chunk if their `positions // chunk` are equal.

    positions  int [B, S], position within the document; a document starts where it is not the previous position + 1
    chunk      tokens per chunk
    """
    _check_token_tensors("chunked", positions=positions)
    if chunk < 1:
        raise ValueError(f"chunked: chunk is a number of tokens and must be at least 1; got {chunk}")
    number = positions // chunk
    starts = document_starts(positions)
    starts[:, 1:] |= number[:, 1:] != number[:, :-1]
    return _single(*segment_bounds(starts), positions.shape[1])


def prefix_lm(positions: Tensor, prefix_lengths: Tensor) -> AttentionMask:
    """Prefix mask: each query attends to the prefix of its document, the keys with `position < prefix_length`.

    Combine with `| causal(...)` for the tokens after the prefix, then with `& document(...)` for padding.

    positions       int [B, S], position within the document; a document starts where it is not the previous + 1
    prefix_lengths  int [B, S], prefix length of the token's document; 0: no prefix
    """
    _check_token_tensors("prefix_lm", positions=positions, prefix_lengths=prefix_lengths)
    first, end = segment_bounds(document_starts(positions))
    index = torch.arange(positions.shape[1], dtype=torch.int32, device=positions.device)
    # Position 0 is at index - position, before the start of the row if the document continues from an earlier row.
    stop = torch.minimum(index - positions + prefix_lengths, end).to(torch.int32)
    return _single(first, stop, positions.shape[1])


def bidirectional(span_ids: Tensor) -> AttentionMask:
    """Bidirectional spans: each query attends to all keys of its span, such as the patches of an image.

    Combine with `| causal(...)` for the text between spans, then with `& document(...)`.

    span_ids  int [B, S]; -1: in no span, fully masked by this rule
    """
    _check_token_tensors("bidirectional", span_ids=span_ids)
    return AttentionMask(*find_runs(span_ids, span_ids), span_ids.shape[1])


def global_tokens(is_global: Tensor) -> AttentionMask:
    """Global tokens: all queries attend to the global keys, and global queries attend to all keys.

    K is the number of runs of global tokens. Combine with `| sliding_window(...)`, then with `& document(...)`.

    is_global  bool [B, S]
    """
    _check_token_tensors("global_tokens", is_global=is_global)
    length = is_global.shape[1]
    flags = is_global.to(torch.int32)
    start, stop = find_runs(flags, torch.ones_like(flags))
    full_stop = torch.where(is_global, length, 0).to(torch.int32)
    return AttentionMask(start, stop, length) | _single(torch.zeros_like(full_stop), full_stop, length)


def shared_prefix(document_ids: Tensor, prefix_ids: Tensor) -> AttentionMask:
    """Shared prefix: each query attends to its document and to the document given by `prefix_ids`, its prompt.

    A prompt and its responses are packed as separate documents, and each response points to the prompt, so the prompt
    is computed once (DPO pairs, grouped rollouts). Responses do not attend to each other. Combine with `& causal(...)`.

    document_ids  int [B, S]; -1: padding
    prefix_ids    int [B, S], id of the document that this one continues; its own id if it continues none
    """
    _check_token_tensors("shared_prefix", document_ids=document_ids, prefix_ids=prefix_ids)
    prefix_ids = torch.where(document_ids < 0, document_ids, prefix_ids)
    return document(document_ids) | document(prefix_ids, document_ids)


def prefix_tree(document_ids: Tensor, parent_ids: Tensor) -> AttentionMask:
    """Tree of shared prefixes: each query attends to its document and to all of that document's ancestors.

    K is at most the depth of the tree; a document packed directly after its parent needs no further interval. Combine
    with `& causal(...)`.

    document_ids  int [B, S]; -1: padding
    parent_ids    int [B, S], id of the document that this one continues; its own id at a root

    Raises:
        ValueError: if the parents form a cycle, or a parent is not in the row.
    """
    _check_token_tensors("prefix_tree", document_ids=document_ids, parent_ids=parent_ids)
    is_token = document_ids >= 0
    mask = document(document_ids)
    ancestor = torch.where(is_token, parent_ids, -1)
    while True:
        step = document(ancestor, document_ids)
        if bool(((step.stop <= step.start).all(dim=2) & is_token).any()):
            raise ValueError(
                "prefix_tree: parent_ids contain an id that is not in document_ids of the row; a root has its own id"
            )
        # parent_ids at any token of the ancestor, here its first, is the parent of the ancestor.
        parent = torch.where(is_token, parent_ids.gather(1, step.start[..., 0].long()), -1)
        extended = mask | step
        if extended.equal(mask):  # no new ancestors: all are roots, or there is a cycle
            if not torch.equal(parent, ancestor):
                raise ValueError("prefix_tree: parent_ids form a cycle; a root must have its own id as parent")
            return mask
        mask, ancestor = extended, parent


def block_diffusion(document_ids: Tensor, clean_ids: Tensor, positions: Tensor, block: int) -> AttentionMask:
    """Block diffusion mask: each query attends to its block, in both directions, and to the earlier clean blocks.

    A row contains a noisy and a clean copy of every document. Queries of both copies attend to their own block, and to
    the earlier blocks of the clean copy (Arriola et al. 2025, arXiv:2503.09573, section 3).

    document_ids  int [B, S], the noisy and the clean copy have different ids; -1: padding
    clean_ids     int [B, S], id of the document's clean copy; at a clean copy, its own id
    positions     int [B, S], position within the copy, from 0
    block         tokens per block
    """
    _check_token_tensors("block_diffusion", document_ids=document_ids, clean_ids=clean_ids, positions=positions)
    same_block = chunked(positions, block) & document(document_ids)
    clean = document(torch.where(document_ids < 0, document_ids, clean_ids), document_ids)
    if clean.intervals > 1:
        raise ValueError("block_diffusion: each clean copy must be contiguous, but an id occurs in several runs")
    start, end = clean.start[..., 0], clean.stop[..., 0]
    before = (positions // block) * block - positions.gather(1, start.long())  # clean tokens in earlier blocks
    return same_block | _single(start, torch.minimum(start + before, end), clean.key_length)


def and_masks(*masks: AttentionMask) -> AttentionMask:
    """Intersection: the pairs visible in all masks."""
    return functools.reduce(operator.and_, _require_masks(masks, "and_masks"))


def or_masks(*masks: AttentionMask) -> AttentionMask:
    """Union: the pairs visible in any of the masks."""
    return functools.reduce(operator.or_, _require_masks(masks, "or_masks"))


def _require_masks(masks: tuple[AttentionMask, ...], name: str) -> tuple[AttentionMask, ...]:
    if not masks:
        raise ValueError(f"{name} needs at least one mask, got none")
    return masks


def _single(start: Tensor, stop: Tensor, key_length: int) -> AttentionMask:
    """Build a mask of one interval per query: integers [B, Q] each, empty if stop <= start."""
    return AttentionMask.from_intervals(start.unsqueeze(2), stop.unsqueeze(2), key_length)


def _check_token_tensors(rule: str, **tensors: Tensor) -> None:
    """Validate token attributes: integers or booleans [B, S], all of the same shape."""
    shape = next(iter(tensors.values())).shape
    for name, value in tensors.items():
        if value.dim() != 2 or value.is_floating_point():
            raise ValueError(f"{rule}: {name} must be integers [B, S], got {value.dtype} {tuple(value.shape)}")
        if value.shape != shape:
            raise ValueError(f"{rule}: {name} has shape {tuple(value.shape)}; expected {tuple(shape)} like the others")


RULES: dict[str, Callable[..., AttentionMask]] = {name: globals()[name] for name in __all__}
"""All rules by name."""
