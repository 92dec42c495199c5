"""Rules of packed documents: by document id, and by the position of a token in its document."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.masks.intervals import document_starts, find_runs, from_dense, segment_bounds
from sightline.masks.mask import AttentionMask
from sightline.masks.rules.arguments import check_count, check_token_tensors, single_interval

__all__ = [  # noqa: RUF022  # the order in errors and help texts
    "causal",
    "document",
    "chunked",
    "block_causal",
    "prefix_lm",
    "bidirectional",
    "document_visibility",
    "block_diffusion",
]


def causal(batch_size: int, length: int, *, device: torch.device | str = "cpu") -> AttentionMask:
    """Causal mask: each query attends to itself and to all earlier keys, `kv <= q`."""
    stop = torch.arange(1, length + 1, dtype=torch.int32, device=device).expand(batch_size, length)
    return single_interval(torch.zeros_like(stop), stop, length)


def document(document_ids: Tensor, key_document_ids: Tensor | None = None) -> AttentionMask:
    """Document mask: each query attends to all keys of its document, in both directions. Combine with `& causal(...)`.

    document_ids      int [B, Q], document of each query; negative: padding, which is fully masked
    key_document_ids  int [B, T], document of each key, for cross-attention; default: `document_ids`
    """
    keys = document_ids if key_document_ids is None else key_document_ids
    check_token_tensors("document", document_ids=document_ids)
    check_token_tensors("document", key_document_ids=keys)
    if keys.shape[0] != document_ids.shape[0]:
        raise ValueError(
            f"document: got {document_ids.shape[0]} rows of queries but {keys.shape[0]} rows of keys; expected equal"
        )
    return AttentionMask(*find_runs(keys, document_ids), keys.shape[1])


def chunked(positions: Tensor, chunk: int) -> AttentionMask:
    """Chunked attention: each query attends to the keys of its chunk, in both directions. Combine with `& causal(...)`.

    Tokens of a document are in the same chunk if their `positions // chunk` are equal.

    positions  int [B, S], position within the document; a document starts where it is not the previous position + 1
    chunk      tokens per chunk
    """
    check_token_tensors("chunked", positions=positions)
    check_count("chunked", "chunk", chunk, 1, "is a number of tokens")
    number = positions // chunk
    starts = document_starts(positions)
    starts[:, 1:] |= number[:, 1:] != number[:, :-1]
    return single_interval(*segment_bounds(starts), positions.shape[1])


def block_causal(positions: Tensor, block: int) -> AttentionMask:
    """Block-causal mask: each query attends to its block, in both directions, and to its document's earlier blocks.

    Causal block diffusion generates blocks one after the other and the tokens of a block together (Arriola et al.
    2025, arXiv:2503.09573); `block_diffusion` adds the noisy copies for training. K = 1. Combine with
    `& document(...)` for padding. Blocks of different lengths are `bidirectional(block_ids) | causal(...)`.

    positions  int [B, S], position within the document; a document starts where it is not the previous position + 1
    block      tokens per block; tokens of a document are in the same block if their `positions // block` are equal
    """
    check_token_tensors("block_causal", positions=positions)
    check_count("block_causal", "block", block, 1, "is a number of tokens")
    number = positions // block
    starts = document_starts(positions)
    first, _ = segment_bounds(starts)
    starts[:, 1:] |= number[:, 1:] != number[:, :-1]
    _, block_end = segment_bounds(starts)
    return single_interval(first, block_end, positions.shape[1])


def prefix_lm(positions: Tensor, prefix_lengths: Tensor) -> AttentionMask:
    """Prefix mask: each query attends to the prefix of its document, the keys with `position < prefix_length`.

    Combine with `| causal(...)` for the tokens after the prefix, then with `& document(...)` for padding.

    positions       int [B, S], position within the document; a document starts where it is not the previous + 1
    prefix_lengths  int [B, S], prefix length of the token's document; 0: no prefix
    """
    check_token_tensors("prefix_lm", positions=positions, prefix_lengths=prefix_lengths)
    first, end = segment_bounds(document_starts(positions))
    index = torch.arange(positions.shape[1], dtype=torch.int32, device=positions.device)
    # Position 0 is at index - position, before the start of the row if the document continues from an earlier row.
    stop = torch.minimum(index - positions + prefix_lengths, end).to(torch.int32)
    return single_interval(first, stop, positions.shape[1])


def bidirectional(span_ids: Tensor) -> AttentionMask:
    """Bidirectional spans: each query attends to all keys of its span, such as the patches of an image.

    Combine with `| causal(...)` for the text between spans, then with `& document(...)`.

    span_ids  int [B, S]; -1: in no span, fully masked by this rule
    """
    check_token_tensors("bidirectional", span_ids=span_ids)
    return AttentionMask(*find_runs(span_ids, span_ids), span_ids.shape[1])


def document_visibility(document_ids: Tensor, visible: Tensor, key_document_ids: Tensor | None = None) -> AttentionMask:
    """Document-to-document visibility: queries of document i attend to the keys of document j if `visible[b, i, j]`.

    A document attends to itself only if the table says so. In retrieval, the table gives the passages that each
    question attends to. Blocks in place of documents, `document_visibility(index // block, table)`, are block-sparse
    attention. K is at most the number of groups of adjacent documents that one document attends to. Costs O(N M + S K).
    Combine with `& causal(...)`.

    document_ids      int [B, Q], document of each query, less than N; negative: padding, which is fully masked
    visible           bool [B, N, M], one table for each row: N documents of queries, M documents of keys
    key_document_ids  int [B, T], document of each key, less than M, for cross-attention; default: `document_ids`
    """
    keys = document_ids if key_document_ids is None else key_document_ids
    _check_visibility(document_ids, keys, visible)
    rows, length = keys.shape
    changes = torch.ones_like(keys, dtype=torch.bool)
    changes[:, 1:] = keys[:, 1:] != keys[:, :-1]
    run = changes.cumsum(dim=1) - 1
    num_runs = int(run.max()) + 1 if run.numel() else 0
    # Start of each run of keys, and the end of the row. A row with fewer runs ends with empty ones, of document -1.
    index = torch.arange(length, device=keys.device).expand(rows, length)
    bounds = index.new_full((rows, num_runs + 1), length).scatter_reduce_(1, run, index, "amin")
    run_ids = keys.new_full((rows, num_runs), -1).scatter_(1, run, keys).long()
    num_documents = visible.shape[1]
    table = F.pad(visible.bool(), (0, 0, 0, 1))  # the last document is padding, which attends to nothing
    table = table.gather(2, run_ids.clamp(min=0)[:, None, :].expand(-1, num_documents + 1, -1))
    intervals = from_dense([table & (run_ids >= 0)[:, None, :]], max(1, num_runs))  # intervals of runs, per document
    start, stop = (bounds.gather(1, runs.long().flatten(1)).view(runs.shape) for runs in intervals)
    query_ids = document_ids.long().masked_fill(document_ids < 0, num_documents)
    return AttentionMask.from_intervals(start, stop, length).take_queries(query_ids)


def _check_visibility(queries: Tensor, keys: Tensor, visible: Tensor) -> None:
    """Validate the arguments of `document_visibility`: shapes, and ids that index the table."""
    check_token_tensors("document_visibility", document_ids=queries)
    check_token_tensors("document_visibility", key_document_ids=keys)
    if visible.dim() != 3 or visible.is_floating_point() or 0 in visible.shape[1:]:
        raise ValueError(
            f"document_visibility: visible must be bool [B, N, M], got {visible.dtype} {tuple(visible.shape)}; "
            "give one table for each row"
        )
    if not queries.shape[0] == keys.shape[0] == visible.shape[0]:
        raise ValueError(
            f"document_visibility: got {queries.shape[0]} rows of queries, {keys.shape[0]} rows of keys and "
            f"{visible.shape[0]} tables; expected equal"
        )
    for name, ids, size in (("document_ids", queries, visible.shape[1]), ("key_document_ids", keys, visible.shape[2])):
        if ids.numel() and int(ids.max()) >= size:
            raise ValueError(
                f"document_visibility: {name} contains {int(ids.max())}, but the table has {size} documents, 0 to "
                f"{size - 1}; number the documents of each row from 0"
            )


def block_diffusion(document_ids: Tensor, clean_ids: Tensor, positions: Tensor, block: int) -> AttentionMask:
    """Block diffusion mask: each query attends to its block, in both directions, and to the earlier clean blocks.

    A row contains a noisy and a clean copy of every document. Queries of both copies attend to their own block, and to
    the earlier blocks of the clean copy (Arriola et al. 2025, arXiv:2503.09573, section 3).

    document_ids  int [B, S], the noisy and the clean copy have different ids; -1: padding
    clean_ids     int [B, S], id of the document's clean copy; at a clean copy, its own id
    positions     int [B, S], position within the copy, from 0
    block         tokens per block
    """
    check_token_tensors("block_diffusion", document_ids=document_ids, clean_ids=clean_ids, positions=positions)
    check_count("block_diffusion", "block", block, 1, "is a number of tokens")
    same_block = chunked(positions, block) & document(document_ids)
    clean = document(torch.where(document_ids < 0, document_ids, clean_ids), document_ids)
    if clean.intervals > 1:
        raise ValueError("block_diffusion: each clean copy must be contiguous, but an id occurs in several runs")
    start, end = clean.start[..., 0], clean.stop[..., 0]
    before = (positions // block) * block - positions.gather(1, start.long())  # clean tokens in earlier blocks
    return same_block | single_interval(start, torch.minimum(start + before, end), clean.key_length)
