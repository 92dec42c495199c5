"""Which keys each rank needs and who sends them, as runs of tokens: no step here looks at single keys.

All arrays are int64 [N], one entry a run.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sightline.masks import AttentionMask

Integers = NDArray[np.int64]


class Pieces(NamedTuple):
    """Tokens [first, last) of `row` belong to `rank`; sorted by row and token, covering all rows.

    offset: where the piece begins among the rank's own tokens of this row.
    """

    row: Integers
    first: Integers
    last: Integers
    rank: Integers
    offset: Integers


class KeyRanges(NamedTuple):
    """Keys [first, last) of `row` that `rank` needs; sorted by rank, row and key, apart from each other.

    offset: where they begin among all keys that the rank needs of this row.
    """

    rank: Integers
    row: Integers
    first: Integers
    last: Integers
    offset: Integers


class Transfers(NamedTuple):
    """`length` keys of `row` go from rank `source` to rank `rank` (which may be the same: its own keys that it needs).

    Sorted by rank, row and key. `source_offset` is the index of the first key among the source's local tokens of this
    row, `target_offset` that among all keys of the row that the rank needs.
    """

    source: Integers
    rank: Integers
    row: Integers
    source_offset: Integers
    target_offset: Integers
    length: Integers


def build_pieces(rows: list[list[tuple[int, int, int]]]) -> Pieces:
    """From the order of each row: sorted pieces (first, last, rank)."""
    row = np.repeat(np.arange(len(rows)), [len(pieces) for pieces in rows])
    first, last, rank = np.array([piece for pieces in rows for piece in pieces], dtype=np.int64).reshape(-1, 3).T
    return Pieces(row, first, last, rank, offset_in_group(rank * len(rows) + row, last - first))


def find_key_ranges(mask: AttentionMask, pieces: Pieces) -> KeyRanges:
    """The union of the intervals of each rank's queries.

    As long as the interval of a query touches that of the query before it, the union of both is one interval. So a run
    of queries, cut where two neighbours' intervals lie apart and where a piece ends, needs all keys from its least
    start to its greatest stop: one reduction a run, of which packed documents have about one a piece.
    """
    rows, queries, width = mask.shape[0], mask.shape[1], mask.intervals
    stride = queries + 1  # between groups, so that runs of two groups never touch
    heads = pieces.row * queries + pieces.first
    found = []
    for k in range(width):
        start, stop = (side[..., k].reshape(-1).numpy() for side in (mask.start, mask.stop))
        apart = np.maximum(start[1:], start[:-1]) > np.minimum(stop[1:], stop[:-1])
        begins = np.union1d(heads, np.flatnonzero(apart) + 1)
        piece = np.searchsorted(heads, begins, side="right") - 1
        group = (pieces.rank * rows + pieces.row)[piece] * stride
        first, last = np.minimum.reduceat(start, begins), np.maximum.reduceat(stop, begins)
        seen = last > first
        found.append(((group + first)[seen], (group + last)[seen]))
    first, last = (np.concatenate(side) for side in zip(*found, strict=True))
    order = first.argsort(kind="stable")
    first, reach = first[order], np.maximum.accumulate(last[order])
    head = np.ones(len(first), dtype=bool)
    head[1:] = first[1:] > reach[:-1]
    tail = np.append(head[1:], True)[: len(first)]
    first, last = first[head], reach[tail]
    group = first // stride
    first, last = first - group * stride, last - group * stride
    return KeyRanges(group // rows, group % rows, first, last, offset_in_group(group, last - first))


def find_transfers(needs: KeyRanges, pieces: Pieces, length: int) -> Transfers:
    """Cut what is needed where its owner changes. length: S."""
    heads = pieces.row * length + pieces.first
    begin = np.searchsorted(heads, needs.row * length + needs.first, side="right") - 1
    end = np.searchsorted(heads, needs.row * length + needs.last, side="left")
    need = np.repeat(np.arange(len(begin)), end - begin)
    piece = count_up(begin, end - begin)
    first = np.maximum(needs.first[need], pieces.first[piece])
    last = np.minimum(needs.last[need], pieces.last[piece])
    return Transfers(
        source=pieces.rank[piece],
        rank=needs.rank[need],
        row=needs.row[need],
        source_offset=pieces.offset[piece] + first - pieces.first[piece],
        target_offset=needs.offset[need] + first - needs.first[need],
        length=last - first,
    )


def count_up(begin: Integers, length: Integers) -> Integers:
    """The numbers begin, begin + 1, ... of each run, `length` of them, one run after the other.

    [5, 9] [2, 3]  ->  [5, 6, 9, 10, 11]
    """
    return np.arange(int(length.sum())) + np.repeat(begin - (length.cumsum() - length), length)


def offset_in_group(group: Integers, length: Integers) -> Integers:
    """Where each run begins when the runs of a group lie one after the other, in the order they come.

    group [3, 1, 3, 1] length [5, 2, 4, 6]  ->  [0, 0, 5, 2]
    """
    order = group.argsort(kind="stable")
    sizes, groups = length[order], group[order]
    passed = sizes.cumsum() - sizes
    place = np.empty_like(passed)
    place[order] = passed - passed[np.searchsorted(groups, groups)]
    return place
