"""The keys that each rank needs and the ranks that send them, as ranges of tokens: no step handles single keys.

All arrays are int64 [N], one entry per range.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sightline.masks import AttentionMask

Integers = NDArray[np.int64]


class Pieces(NamedTuple):
    """Tokens [first, last) of `row` belong to `rank`; sorted by row and token, covering all rows.

    `offset` is the index of the first token among the rank's tokens of this row.
    """

    row: Integers
    first: Integers
    last: Integers
    rank: Integers
    offset: Integers


class KeyRanges(NamedTuple):
    """Keys [first, last) of `row` that `rank` needs; sorted by rank, row and key, disjoint and not adjacent.

    `offset` is the index of the first key among all keys of this row that the rank needs.
    """

    rank: Integers
    row: Integers
    first: Integers
    last: Integers
    offset: Integers


class Transfers(NamedTuple):
    """Rank `source` sends `length` keys of `row` to rank `target`; the two are equal for the local keys of a rank.

    Sorted by target, row and key. `source_offset` is the index of the first key among the source's tokens of this row,
    `target_offset` its index among all keys of the row that the target needs.
    """

    source: Integers
    target: Integers
    row: Integers
    source_offset: Integers
    target_offset: Integers
    length: Integers


def build_pieces(rows: list[list[tuple[int, int, int]]]) -> Pieces:
    """Convert the order of each row, a sorted list of pieces (first, last, rank), to arrays."""
    row = np.repeat(np.arange(len(rows)), [len(pieces) for pieces in rows])
    first, last, rank = np.array([piece for pieces in rows for piece in pieces], dtype=np.int64).reshape(-1, 3).T
    return Pieces(row, first, last, rank, offset_in_group(rank * len(rows) + row, last - first))


def find_key_ranges(mask: AttentionMask, pieces: Pieces) -> KeyRanges:
    """Return the union of the intervals of each rank's queries.

    If the intervals of consecutive queries overlap or touch, their union is one interval. So split the queries into
    runs where the intervals of neighbors are disjoint and where a piece ends: a run needs all keys from its least start
    to its greatest stop. That is one reduction per run, and packed documents have about one run per piece.
    """
    rows, queries, intervals = mask.shape[0], mask.shape[1], mask.intervals
    stride = queries + 1  # between groups, so that ranges of two groups never touch
    piece_starts = pieces.row * queries + pieces.first
    found = []
    for k in range(intervals):
        start, stop = (side[..., k].reshape(-1).numpy() for side in (mask.start, mask.stop))
        disjoint = np.maximum(start[1:], start[:-1]) > np.minimum(stop[1:], stop[:-1])
        run_starts = np.union1d(piece_starts, np.flatnonzero(disjoint) + 1)
        piece = np.searchsorted(piece_starts, run_starts, side="right") - 1
        group = (pieces.rank * rows + pieces.row)[piece] * stride
        first, last = np.minimum.reduceat(start, run_starts), np.maximum.reduceat(stop, run_starts)
        visible = last > first
        found.append(((group + first)[visible], (group + last)[visible]))
    first, last = (np.concatenate(side) for side in zip(*found, strict=True))
    order = first.argsort(kind="stable")
    first, reach = first[order], np.maximum.accumulate(last[order])
    is_first = np.ones(len(first), dtype=bool)
    is_first[1:] = first[1:] > reach[:-1]
    is_last = np.append(is_first[1:], True)[: len(first)]
    first, last = first[is_first], reach[is_last]
    group = first // stride
    first, last = first - group * stride, last - group * stride
    return KeyRanges(group // rows, group % rows, first, last, offset_in_group(group, last - first))


def find_transfers(key_ranges: KeyRanges, pieces: Pieces, length: int) -> Transfers:
    """Split the needed key ranges of rows of `length` tokens where the owner changes."""
    piece_starts = pieces.row * length + pieces.first
    start = np.searchsorted(piece_starts, key_ranges.row * length + key_ranges.first, side="right") - 1
    stop = np.searchsorted(piece_starts, key_ranges.row * length + key_ranges.last, side="left")
    index = np.repeat(np.arange(len(start)), stop - start)
    piece = concatenate_ranges(start, stop - start)
    first = np.maximum(key_ranges.first[index], pieces.first[piece])
    last = np.minimum(key_ranges.last[index], pieces.last[piece])
    return Transfers(
        source=pieces.rank[piece],
        target=key_ranges.rank[index],
        row=key_ranges.row[index],
        source_offset=pieces.offset[piece] + first - pieces.first[piece],
        target_offset=key_ranges.offset[index] + first - key_ranges.first[index],
        length=last - first,
    )


def concatenate_ranges(start: Integers, length: Integers) -> Integers:
    """Return the integers of all ranges [start, start + length), concatenated.

    [5, 9] [2, 3]  ->  [5, 6, 9, 10, 11]
    """
    return np.arange(int(length.sum())) + np.repeat(start - (length.cumsum() - length), length)


def offset_in_group(group: Integers, length: Integers) -> Integers:
    """Return the offset of each range if the ranges of a group are concatenated in the given order.

    group [3, 1, 3, 1] length [5, 2, 4, 6]  ->  [0, 0, 5, 2]
    """
    order = group.argsort(kind="stable")
    lengths, groups = length[order], group[order]
    before = lengths.cumsum() - lengths
    offset = np.empty_like(before)
    offset[order] = before - before[np.searchsorted(groups, groups)]
    return offset
