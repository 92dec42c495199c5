"""AttentionMask -> tiles: runs of queries, each with the few slices of keys it attends.

A fused kernel without a mask is fastest on a rectangle that everyone sees, and on a square that is causal. Most masks
are made of those: while a query's intervals stay put or grow by one key from query to query, a whole run of queries is
one rectangle and one causal square per interval. Sliding intervals are cut into short tiles whose pattern repeats, and
what follows no rule becomes tiles with a pattern of their own. No tile computes what lies between far intervals.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 128  # queries of a tile that needs a pattern
SHORT_RUN = 32  # runs shorter than this share a tile: one masked call is cheaper than many small ones
MIN_UNMASKED_KEYS = 256  # keys everyone sees get a call of their own, without a pattern, from this many on
SMALL_GAP = 32  # hidden keys between two slices that are cheaper to compute than to leave out


class Segment(NamedTuple):
    """Keys `[first, last)` for all queries of a tile.

    With `causal`, query i of the tile sees keys first .. first + i (there are as many keys as queries).
    With `pattern`, bool [queries, keys], it sees what the pattern says. With neither, it sees all of them.
    """

    first: int
    last: int
    causal: bool = False
    pattern: Tensor | None = None


class Tile(NamedTuple):
    """Queries `[first, last)` of a row; every one of them sees at least one key of some segment."""

    row: int
    first: int
    last: int
    segments: list[Segment]


def build_tiles(start: Tensor, stop: Tensor) -> list[Tile]:
    """From canonical int32 [B, Q, K] on the CPU. Queries that see nothing are in no tile."""
    tiles: list[Tile] = []
    runs = _find_runs(start, stop)
    at = 0
    while at < len(runs):
        end = at + 1
        if runs[at].length < SHORT_RUN:
            while end < len(runs) and _may_share(runs[at], runs[end - 1], runs[end]):
                end += 1
        row, first, last = runs[at].row, runs[at].first, runs[end - 1].last
        if end - at > 1:
            tiles.append(Tile(row, first, last, _irregular(start[row, first:last], stop[row, first:last])))
        elif any(runs[at].slides):
            tiles += _sliding(runs[at])
        else:
            tiles.append(Tile(row, first, last, _growing(runs[at])))
        at = end
    return tiles


class _Run(NamedTuple):
    """Queries `[first, last)` whose intervals all move in the same way.

    start, stop  intervals of the first query
    slides       per interval, whether its start moves on by one key from query to query
    grows        per interval, whether its stop does
    """

    row: int
    first: int
    last: int
    start: list[int]
    stop: list[int]
    slides: list[bool]
    grows: list[bool]

    @property
    def length(self) -> int:
        return self.last - self.first


def _may_share(opening: _Run, before: _Run, run: _Run) -> bool:
    """Whether a short run that follows another lies in the tile the opening run began."""
    adjacent = run.row == before.row and run.first == before.last
    return adjacent and run.length < SHORT_RUN and run.last - opening.first <= TILE


def _find_runs(start: Tensor, stop: Tensor) -> list[_Run]:
    """Cut every row where the way its intervals move changes; leave out queries that see nothing."""
    rows, queries, width = start.shape
    if start.numel() == 0:
        return []
    seen = stop > start
    slides, grows = start.diff(dim=1), stop.diff(dim=1)
    steady = (slides >= 0) & (slides <= 1) & (grows >= 0) & (grows <= 1) & (seen[:, 1:] == seen[:, :-1])
    steady = steady.all(dim=2)
    same = torch.ones_like(steady)  # moves as the step before moved
    if queries > 2:
        same[:, 1:] = ((slides[:, 1:] == slides[:, :-1]) & (grows[:, 1:] == grows[:, :-1])).all(dim=2)
        same[:, 1:] |= ~steady[:, :-1]
    begins = torch.ones(rows, queries, dtype=torch.bool)
    begins[:, 1:] = ~(steady & same)
    row, first = begins.nonzero(as_tuple=True)
    last = torch.cat([first[1:], first.new_tensor([queries])])
    last = torch.where(last <= first, queries, last)  # the next run begins in another row
    inside = (first + 1 < last)[:, None]
    step = first.clamp(max=max(0, queries - 2))
    if queries > 1:
        moves = (inside & (slides[row, step] > 0)).tolist(), (inside & (grows[row, step] > 0)).tolist()
    else:
        moves = ([[False] * width] * len(row),) * 2
    heads = zip(
        row.tolist(), first.tolist(), last.tolist(), start[row, first].tolist(), stop[row, first].tolist(), *moves,
        strict=True,
    )  # fmt: skip
    return [_drop_empty_intervals(*head) for head in heads if head[4][0] > head[3][0]]


def _drop_empty_intervals(
    row: int, first: int, last: int, start: list[int], stop: list[int], slides: list[bool], grows: list[bool]
) -> _Run:
    kept = [k for k in range(len(start)) if stop[k] > start[k]]
    pick = [[values[k] for k in kept] for values in (start, stop, slides, grows)]
    return _Run(row, first, last, *pick)  # type: ignore[arg-type]


def _growing(run: _Run) -> list[Segment]:
    """Segments of a run where no interval slides: a rectangle that all its queries see and, where an interval grows, a
    causal square behind it."""
    segments = []
    for start, stop, grows in zip(run.start, run.stop, run.grows, strict=True):
        if not grows:
            segments.append(Segment(start, stop))
            continue
        square = stop - 1  # the last key of the first query
        if square > start:
            segments.append(Segment(start, square))
        segments.append(Segment(square, square + run.length, causal=True))
    return segments


def _sliding(run: _Run) -> Iterator[Tile]:
    """Tiles of a run with a sliding interval. Where every interval moves as one, tiles differ by a shift only and share
    their patterns."""
    reach = max(stop - start for start, stop in zip(run.start, run.stop, strict=True))
    size = max(TILE, min(1024, reach // 4))
    in_step = all(run.slides) and all(run.grows)
    shared: dict[int, list[Segment]] = {}
    for at in range(0, run.length, size):
        length = min(size, run.length - at)
        shift = at if in_step else 0
        if not in_step or length not in shared:
            moved = torch.arange(at - shift, at - shift + length, dtype=torch.int32)[:, None]
            start = torch.tensor(run.start, dtype=torch.int32) + moved * torch.tensor(run.slides)
            stop = torch.tensor(run.stop, dtype=torch.int32) + moved * torch.tensor(run.grows)
            shared[length] = _irregular(start, stop)
        segments = [s._replace(first=s.first + shift, last=s.last + shift) for s in shared[length]]
        yield Tile(run.row, run.first + at, run.first + at + length, segments)


def _irregular(start: Tensor, stop: Tensor) -> list[Segment]:
    """Segments of any tile, from intervals int32 [n, K] of its queries.

    All starts and stops cut the keys into pieces within which the same queries see every key. Pieces that all queries
    see, where long enough to be worth it, get a segment without a pattern; pieces that none sees are left out; what
    lies between becomes segments with a pattern.
    """
    seen = stop > start
    edges, place = torch.cat([start[seen], stop[seen]]).unique(return_inverse=True)
    opened, closed = place.chunk(2)
    change = torch.zeros(len(edges), dtype=torch.int32)
    change.index_add_(0, opened, torch.ones_like(opened, dtype=torch.int32))
    change.index_add_(0, closed, torch.full_like(closed, -1, dtype=torch.int32))
    counts, points = change.cumsum(0).tolist(), edges.tolist()
    pieces: list[tuple[int, int, bool]] = []  # first, last, whether all queries see all of it
    for first, last, count in zip(points, points[1:], counts, strict=False):
        whole = count == len(start) and last - first >= MIN_UNMASKED_KEYS
        if count == 0:
            continue
        if pieces and not whole and not pieces[-1][2] and first - pieces[-1][1] <= SMALL_GAP:
            pieces[-1] = (pieces[-1][0], last, False)
        else:
            pieces.append((first, last, whole))
    return [
        Segment(first, last, pattern=None if whole else _pattern(start, stop, first, last))
        for first, last, whole in pieces
    ]


def _pattern(start: Tensor, stop: Tensor, first: int, last: int) -> Tensor:
    """bool [n, last - first]: which of these keys each query sees."""
    keys = torch.arange(first, last, dtype=torch.int32)[:, None]
    return ((keys >= start[:, None, :]) & (keys < stop[:, None, :])).any(dim=2)
