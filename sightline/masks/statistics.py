"""Statistics of a mask, from its intervals in O(Q K + cells): visible pairs per cell, segment boundaries, blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sightline.masks.block_mask import block_states
from sightline.masks.mask import AttentionMask

MAX_BLOCKS_PER_STEP = 2**22  # bounds memory: small blocks can far outnumber the tokens


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Statistics of all rows of a mask."""

    queries: int
    keys: int
    intervals: int
    """K, the most intervals that any query has."""
    visible_pairs: list[int]
    """Visible pairs of each row."""
    block_size: int
    blocks: tuple[int, int, int]
    """Full, partial and empty blocks of all rows. As in FlexAttention's BlockMask, a block that extends past the last
    query or key is never full."""

    @property
    def pairs_per_row(self) -> float:
        return sum(self.visible_pairs) / max(1, len(self.visible_pairs))

    @property
    def sparsity(self) -> float:
        """Fraction of the query-key pairs that are not visible; 1 if there are no pairs."""
        return 1 - self.pairs_per_row / max(1, self.queries * self.keys)

    @property
    def share_of_causal(self) -> float | None:
        """Visible pairs relative to plain causal attention, S (S + 1) / 2 per row; None if Q != T."""
        if self.queries != self.keys:
            return None
        return self.pairs_per_row / max(1, self.queries * (self.queries + 1) / 2)

    def describe(self) -> str:
        """One line of text: shape, K, mean visible pairs per row, and their share."""
        shape = f"S {self.queries:,}" if self.queries == self.keys else f"Q {self.queries:,}, T {self.keys:,}"
        causal = self.share_of_causal
        share = f"{1 - self.sparsity:.1%} of all" if causal is None else f"{causal:.1%} of causal"
        return f"{shape}, K {self.intervals}, {round(self.pairs_per_row):,} visible pairs ({share})"


def get_statistics(mask: AttentionMask, block_size: int = 128) -> Statistics:
    """Count the visible pairs and the blocks of all rows."""
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1 token, got {block_size}")
    batch_size, queries, keys = mask.shape
    full = partial = 0
    step = max(1, MAX_BLOCKS_PER_STEP // max(1, batch_size * _ceil(keys, block_size))) * block_size
    for first in range(0, queries, step):
        strip = mask.take_queries(torch.arange(first, min(first + step, queries), device=mask.device))
        partial_blocks, full_blocks = block_states(strip.start, strip.stop, keys, block_size, block_size)
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
    """Count the visible pairs of each cell of (queries, keys) tokens: int64 [ceil(Q / queries), ceil(T / keys)].

    In a line of cells of w keys, the keys >= x cover w - x % w keys of the cell that contains x and all w keys of each
    later cell. This is the prefix sum of two adjacent entries, w - x % w and x % w; an interval [start, stop) adds
    these entries for start and subtracts them for stop.
    """
    tall, wide = cell
    _, queries, keys = mask.shape
    lines, columns = _ceil(queries, tall), _ceil(keys, wide)
    line = torch.arange(queries)[:, None] // tall
    steps = torch.zeros(lines, columns + 2, dtype=torch.int64)  # stop = T may write two entries past the last cell
    for end, sign in ((mask.start[row], 1), (mask.stop[row], -1)):
        end = end.cpu().long()
        index, remainder = (line * (columns + 2) + end // wide).flatten(), (end % wide).flatten()
        steps.view(-1).scatter_add_(0, index, sign * (wide - remainder))
        steps.view(-1).scatter_add_(0, index + 1, sign * remainder)
    return steps.cumsum(1)[:, :columns]


def occupancy(mask: AttentionMask, row: int, cell: tuple[int, int]) -> Tensor:
    """Return the visible fraction of the pairs of each cell: float64 [ceil(Q / queries), ceil(T / keys)].

    cell: (queries, keys) per cell. Cells cut off by the bottom or right edge count only the pairs inside the mask.
    """
    _, queries, keys = mask.shape
    pairs = _sizes(queries, cell[0])[:, None] * _sizes(keys, cell[1])
    return visible_in_cells(mask, row, cell).double() / pairs


def segment_boundaries(mask: AttentionMask, row: int) -> list[int]:
    """Return the first tokens of the independent segments of a row, except its first: no visible pair crosses them.

    In a packed row these are the document starts (and the chunk starts of a `chunked` mask); a run of padding is one
    segment. Empty if queries and keys are not the same tokens (Q != T).
    """
    _, queries, keys = mask.shape
    if queries != keys or queries == 0:
        return []
    start, stop = mask.start[row].cpu().long(), mask.stop[row].cpu().long()
    empty = start >= stop
    lowest = start.masked_fill(empty, keys).amin(1)  # [Q], first visible key
    highest = stop.masked_fill(empty, 0).amax(1)  # [Q], end of the last visible interval
    token = torch.arange(1, queries)
    none_attends_back = lowest.flip(0).cummin(0).values.flip(0)[1:] >= token
    none_attends_ahead = highest.cummax(0).values[:-1] <= token
    fully_masked = empty.all(1)
    return token[none_attends_back & none_attends_ahead & ~(fully_masked[1:] & fully_masked[:-1])].tolist()


def check_row(mask: AttentionMask, row: int) -> None:
    """Validate a row index.

    Raises:
        ValueError: if the mask has no such row.
    """
    if not 0 <= row < mask.shape[0]:
        raise ValueError(f"row {row} is not in this mask of {mask.shape[0]} rows: choose 0 to {mask.shape[0] - 1}")


def _sizes(length: int, cell: int) -> Tensor:
    """Return the number of tokens in each cell of a length; the last cell may be smaller."""
    first = torch.arange(0, length, cell)
    return (length - first).clamp(max=cell)


def _ceil(length: int, cell: int) -> int:
    return -(-length // cell)
