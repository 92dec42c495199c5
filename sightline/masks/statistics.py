"""Visible pairs of a mask's cells, where a row falls apart, its blocks: from the intervals, in O(Q K + cells)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sightline.masks.block_mask import block_states
from sightline.masks.mask import AttentionMask

BLOCKS_AT_ONCE = 2**22  # small blocks are counted in strips, for they may be many more than there are tokens


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a mask amounts to, over all of its rows."""

    queries: int
    keys: int
    intervals: int
    """K, the most intervals a query has."""
    visible_pairs: list[int]
    """Of each row."""
    block_size: int
    blocks: tuple[int, int, int]
    """Full, partial and empty ones over all rows, as in FlexAttention's BlockMask: one that hangs over the edge of
    the mask is never full."""

    @property
    def pairs_per_row(self) -> float:
        return sum(self.visible_pairs) / len(self.visible_pairs)

    @property
    def sparsity(self) -> float:
        """Share of all query-key pairs that is not visible."""
        return 1 - self.pairs_per_row / (self.queries * self.keys)

    @property
    def share_of_causal(self) -> float | None:
        """Visible pairs as a share of those of plain causal attention, S (S + 1) / 2 a row; None where Q != T."""
        if self.queries != self.keys:
            return None
        return self.pairs_per_row / (self.queries * (self.queries + 1) / 2)

    def describe(self) -> str:
        """One line: shape, K, visible pairs of a row (the mean of several), and their share."""
        shape = f"S {self.queries:,}" if self.queries == self.keys else f"Q {self.queries:,}, T {self.keys:,}"
        causal = self.share_of_causal
        share = f"{1 - self.sparsity:.1%} of all" if causal is None else f"{causal:.1%} of causal"
        return f"{shape}, K {self.intervals}, {round(self.pairs_per_row):,} visible pairs ({share})"


def get_statistics(mask: AttentionMask, block_size: int = 128) -> Statistics:
    """Count the pairs and blocks of all rows."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1 token, got {block_size}")
    batch_size, queries, keys = mask.shape
    full = partial = 0
    strip = max(1, BLOCKS_AT_ONCE // (batch_size * _ceil(keys, block_size))) * block_size
    for first in range(0, queries, strip):
        part = mask.take_queries(torch.arange(first, min(first + strip, queries), device=mask.device))
        partial_blocks, full_blocks = block_states(part.start, part.stop, keys, block_size, block_size)
        full, partial = full + int(full_blocks.sum()), partial + int(partial_blocks.sum())
    total = batch_size * _ceil(queries, block_size) * _ceil(keys, block_size)
    return Statistics(
        queries=queries,
        keys=keys,
        intervals=mask.intervals,
        visible_pairs=mask.visible_pairs().tolist(),
        block_size=block_size,
        blocks=(full, partial, total - full - partial),
    )


def visible_in_cells(mask: AttentionMask, row: int, cell: tuple[int, int]) -> Tensor:
    """Visible pairs in every cell of `cell` = (queries, keys) tokens: int64 [ceil(Q / queries), ceil(T / keys)].

    The keys from x on fill w - x % w of the cell that x lies in (cells are w keys wide) and w of each cell right of
    it. As a prefix sum along a line of cells that is two numbers in neighbouring places, w - x % w and x % w; an
    interval [start, stop) adds them for start and takes them away for stop.
    """
    tall, wide = cell
    _, queries, keys = mask.shape
    lines, columns = _ceil(queries, tall), _ceil(keys, wide)
    line = torch.arange(queries)[:, None] // tall
    steps = torch.zeros(lines, columns + 2, dtype=torch.int64)  # stop = T may write into two places past the last cell
    for end, sign in ((mask.start[row], 1), (mask.stop[row], -1)):
        end = end.cpu().long()
        place, rest = (line * (columns + 2) + end // wide).flatten(), (end % wide).flatten()
        steps.view(-1).scatter_add_(0, place, sign * (wide - rest))
        steps.view(-1).scatter_add_(0, place + 1, sign * rest)
    return steps.cumsum(1)[:, :columns]


def occupancy(mask: AttentionMask, row: int, cell: tuple[int, int]) -> Tensor:
    """Share of the pairs of every cell that is visible: float64 [ceil(Q / queries), ceil(T / keys)].

    cell: its size in (queries, keys). Cells at the lower and right edge are measured by the pairs they really have.
    """
    _, queries, keys = mask.shape
    pairs = _sizes(queries, cell[0])[:, None] * _sizes(keys, cell[1])
    return visible_in_cells(mask, row, cell).double() / pairs


def separations(mask: AttentionMask, row: int) -> list[int]:
    """Tokens before which the row falls apart: no token from there on sees one before it, nor the other way round.

    These are the document boundaries of a packed row (and the chunk boundaries under `chunked`); padding counts as
    one part. Empty where queries and keys are not the same tokens (Q != T).
    """
    _, queries, keys = mask.shape
    if queries != keys:
        return []
    start, stop = mask.start[row].cpu().long(), mask.stop[row].cpu().long()
    empty = start >= stop
    lowest = start.masked_fill(empty, keys).amin(1)  # [Q], first key that a query sees
    highest = stop.masked_fill(empty, 0).amax(1)  # [Q], end of the last key that it sees
    token = torch.arange(1, queries)
    none_looks_back = lowest.flip(0).cummin(0).values.flip(0)[1:] >= token
    none_looks_ahead = highest.cummax(0).values[:-1] <= token
    blind = empty.all(1)
    return token[none_looks_back & none_looks_ahead & ~(blind[1:] & blind[:-1])].tolist()


def check_row(mask: AttentionMask, row: int) -> None:
    """Refuse a row the mask has not."""
    if not 0 <= row < mask.shape[0]:
        raise ValueError(f"row {row} is not in this mask of {mask.shape[0]} rows: choose 0 to {mask.shape[0] - 1}")


def _sizes(length: int, cell: int) -> Tensor:
    """Tokens of each cell that a length is cut into; the last one may be smaller."""
    first = torch.arange(0, length, cell)
    return (length - first).clamp(max=cell)


def _ceil(length: int, cell: int) -> int:
    return -(-length // cell)
