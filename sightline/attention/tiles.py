"""Split an AttentionMask into tiles: runs of queries, each with a few slices of keys.

Fused kernels are fastest without a mask: on rectangles in which all pairs are visible, and on causal squares. Most
masks consist of these: as long as each interval stays the same or grows by one key per query, a run of queries is one
rectangle and one causal square per interval. Sliding intervals are split into short tiles with a repeating pattern, and
irregular intervals into tiles with separate patterns. The keys between distant intervals are not computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 128  # queries per tile with a pattern
SHORT_RUN = 32  # shorter runs of queries share a tile: one masked call is cheaper than many small ones
MIN_UNMASKED_KEYS = 256  # at least this many keys visible to all queries get a separate call without a pattern
SMALL_GAP = 32  # up to this many masked keys between two slices are cheaper to compute than to skip


class Segment(NamedTuple):
    """Keys `[first, last)` for all queries of a tile.

    If `causal`, query i of the tile attends to keys first .. first + i (the number of keys equals that of queries).
    If `pattern` is given, bool [queries, keys], it selects the visible pairs. Otherwise all pairs are visible.
    """

    first: int
    last: int
    causal: bool = False
    pattern: Tensor | None = None


class Tile(NamedTuple):
    """Queries `[first, last)` of a row; each attends to at least one key of the segments."""

    row: int
    first: int
    last: int
    segments: list[Segment]


def build_tiles(start: Tensor, stop: Tensor) -> list[Tile]:
    """Build tiles from canonical int32 [B, Q, K] on the CPU. Fully masked queries are in no tile."""
    tiles: list[Tile] = []
    runs = _find_runs(start, stop)
    index = 0
    while index < len(runs):
        run, end = runs[index], index + 1
        if run.length < SHORT_RUN:
            while end < len(runs) and _may_share(run, runs[end - 1], runs[end]):
                end += 1
        row, first, last = run.row, run.first, runs[end - 1].last
        if end - index > 1:
            tiles.append(Tile(row, first, last, _irregular_segments(start[row, first:last], stop[row, first:last])))
        elif any(run.slides):
            tiles += _sliding_tiles(run)
        else:
            tiles.append(Tile(row, first, last, _growing_segments(run)))
        index = end
    return tiles


class _Run(NamedTuple):
    """Queries `[first, last)` over which each interval changes by constant steps.

    start, stop  intervals of the first query
    slides       per interval, whether its start increases by one key per query (otherwise it is constant)
    grows        per interval, whether its stop increases by one key per query (otherwise it is constant)
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


def _may_share(first_run: _Run, previous_run: _Run, run: _Run) -> bool:
    """Return whether `run`, which follows `previous_run`, may be added to the tile that starts with `first_run`."""
    adjacent = run.row == previous_run.row and run.first == previous_run.last
    return adjacent and run.length < SHORT_RUN and run.last - first_run.first <= TILE


def _find_runs(start: Tensor, stop: Tensor) -> list[_Run]:
    """Split each row into runs, wherever the steps of its intervals change; omit fully masked queries."""
    rows, queries, num_intervals = start.shape
    if start.numel() == 0:
        return []
    nonempty = stop > start
    slides, grows = start.diff(dim=1), stop.diff(dim=1)
    steady = (slides >= 0) & (slides <= 1) & (grows >= 0) & (grows <= 1) & (nonempty[:, 1:] == nonempty[:, :-1])
    steady = steady.all(dim=2)
    same = torch.ones_like(steady)  # same steps as from the previous query
    if queries > 2:
        same[:, 1:] = ((slides[:, 1:] == slides[:, :-1]) & (grows[:, 1:] == grows[:, :-1])).all(dim=2)
        same[:, 1:] |= ~steady[:, :-1]
    is_start = torch.ones(rows, queries, dtype=torch.bool)
    is_start[:, 1:] = ~(steady & same)
    row, first = is_start.nonzero(as_tuple=True)
    last = torch.cat([first[1:], first.new_tensor([queries])])
    last = torch.where(last <= first, queries, last)  # the next run starts in another row
    inside = (first + 1 < last)[:, None]
    step = first.clamp(max=max(0, queries - 2))
    if queries > 1:
        moves = (inside & (slides[row, step] > 0)).tolist(), (inside & (grows[row, step] > 0)).tolist()
    else:
        moves = ([[False] * num_intervals] * len(row),) * 2
    runs = zip(
        row.tolist(), first.tolist(), last.tolist(), start[row, first].tolist(), stop[row, first].tolist(), *moves,
        strict=True,
    )  # fmt: skip
    return [_drop_empty_intervals(*run) for run in runs if run[4][0] > run[3][0]]


def _drop_empty_intervals(
    row: int, first: int, last: int, start: list[int], stop: list[int], slides: list[bool], grows: list[bool]
) -> _Run:
    used = [k for k in range(len(start)) if stop[k] > start[k]]
    pick = [[values[k] for k in used] for values in (start, stop, slides, grows)]
    return _Run(row, first, last, *pick)  # type: ignore[arg-type]


def _growing_segments(run: _Run) -> list[Segment]:
    """Return the segments of a run without sliding intervals: a rectangle per interval, followed by a causal square if
    the interval grows."""
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


def _sliding_tiles(run: _Run) -> Iterator[Tile]:
    """Yield the tiles of a run with a sliding interval. If all intervals slide and grow, the tiles are shifted copies
    and share their patterns."""
    interval_length = max(stop - start for start, stop in zip(run.start, run.stop, strict=True))
    size = max(TILE, min(1024, interval_length // 4))
    all_slide = all(run.slides) and all(run.grows)
    shared: dict[int, list[Segment]] = {}
    for offset in range(0, run.length, size):
        length = min(size, run.length - offset)
        shift = offset if all_slide else 0
        if not all_slide or length not in shared:
            steps = torch.arange(offset - shift, offset - shift + length, dtype=torch.int32)[:, None]
            start = torch.tensor(run.start, dtype=torch.int32) + steps * torch.tensor(run.slides)
            stop = torch.tensor(run.stop, dtype=torch.int32) + steps * torch.tensor(run.grows)
            shared[length] = _irregular_segments(start, stop)
        segments = [s._replace(first=s.first + shift, last=s.last + shift) for s in shared[length]]
        yield Tile(run.row, run.first + offset, run.first + offset + length, segments)


def _irregular_segments(start: Tensor, stop: Tensor) -> list[Segment]:
    """Return the segments of any tile, from the intervals int32 [n, K] of its queries.

    All starts and stops split the keys into pieces, each visible to the same queries throughout. A long enough piece
    that is visible to all queries gets a segment without a pattern, a piece that is visible to none is omitted, and
    the others become segments with a pattern.
    """
    nonempty = stop > start
    edges, edge_index = torch.cat([start[nonempty], stop[nonempty]]).unique(return_inverse=True)
    start_edges, stop_edges = edge_index.chunk(2)
    change = torch.zeros(len(edges), dtype=torch.int32)
    change.index_add_(0, start_edges, torch.ones_like(start_edges, dtype=torch.int32))
    change.index_add_(0, stop_edges, torch.full_like(stop_edges, -1, dtype=torch.int32))
    counts, points = change.cumsum(0).tolist(), edges.tolist()
    pieces: list[tuple[int, int, bool]] = []  # first, last, whether visible to all queries
    for first, last, count in zip(points, points[1:], counts, strict=False):
        unmasked = count == len(start) and last - first >= MIN_UNMASKED_KEYS
        if count == 0:
            continue
        if pieces and not unmasked and not pieces[-1][2] and first - pieces[-1][1] <= SMALL_GAP:
            pieces[-1] = (pieces[-1][0], last, False)
        else:
            pieces.append((first, last, unmasked))
    return [
        Segment(first, last, pattern=None if unmasked else _pattern(start, stop, first, last))
        for first, last, unmasked in pieces
    ]


def _pattern(start: Tensor, stop: Tensor, first: int, last: int) -> Tensor:
    """Return which of the keys `[first, last)` are visible to each query: bool [n, last - first]."""
    keys = torch.arange(first, last, dtype=torch.int32)[:, None]
    return ((keys >= start[:, None, :]) & (keys < stop[:, None, :])).any(dim=2)
