"""Split an AttentionMask into tiles: runs of queries, each with a few slices of keys.

Fused kernels are fastest without a mask: on rectangles in which all pairs are visible, and on causal squares. Most
masks consist of these: as long as each interval stays the same or grows by one key per query, a run of queries is one
rectangle and one causal square per interval. Sliding intervals are split into short tiles with a repeating pattern, and
irregular intervals into tiles with separate patterns, long ones where all queries attend to about the same range of
keys. The keys between distant intervals are not computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

TILE = 128  # queries per tile with a pattern
MAX_TILE = 1024  # queries per tile of wide irregular masks
MERGE = 1.1  # tiles are merged if this adds at most a tenth of pairs: the kernel is a third faster on 1024 queries
SHORT_RUN = 32  # shorter runs of queries share a tile: one masked call is cheaper than many small ones
MIN_UNMASKED_KEYS = 256  # at least this many keys visible to all queries get a separate call without a pattern
SMALL_GAP = 32  # up to this many masked keys between two slices are cheaper to compute than to skip


class Segment(NamedTuple):
    """Keys `[first, last)` for all queries of a tile.

    If `causal`, query i of the tile attends to keys first .. first + i (the number of keys equals that of queries).
    If `pattern` is given, bool [queries or 1, keys], it selects the visible pairs. Otherwise all pairs are visible.
    """

    first: int
    last: int
    causal: bool = False
    pattern: Tensor | None = None


class Tile(NamedTuple):
    """Queries `[first, last)` of a row, with the segments of keys that they attend to.

    fully_masked  bool [queries], queries that attend to no key, for which the segments mean nothing; None if all
                  queries attend to a key. A tile neither starts nor ends with such a query.
    """

    row: int
    first: int
    last: int
    segments: list[Segment]
    fully_masked: Tensor | None = None


def build_tiles(start: Tensor, stop: Tensor) -> list[Tile]:
    """Build tiles from canonical int32 [B, Q, K] on the CPU, in O(B Q K + area of the patterns).

    Fully masked queries are in no tile, except for short gaps inside a tile of irregular queries.
    """
    spans = _merge_irregular(_group(_find_runs(start, stop)), start, stop)
    runs = iter(_describe([span for span in spans if not span.irregular], start, stop))
    tiles: list[Tile] = []
    for row, first, last, irregular in spans:
        if irregular:
            tile_start, tile_stop = start[row, first:last], stop[row, first:last]
            fully_masked = tile_stop[:, 0] <= tile_start[:, 0]
            segments = _irregular_segments(tile_start, tile_stop)
            tiles.append(Tile(row, first, last, segments, fully_masked if bool(fully_masked.any()) else None))
            continue
        run = next(runs)
        if any(run.slides):
            tiles += _sliding_tiles(run)
        else:
            tiles.append(Tile(row, first, last, _growing_segments(run)))
    return tiles


class _Span(NamedTuple):
    """Queries `[first, last)` of a row: one run, or `irregular`: several short runs that share a tile."""

    row: int
    first: int
    last: int
    irregular: bool


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


def _find_runs(start: Tensor, stop: Tensor) -> list[tuple[int, int, int, bool]]:
    """Split each row into runs, wherever the steps of its intervals change: (row, first, last, whether it attends to
    any key)."""
    rows, queries, _ = start.shape
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
    return list(zip(row.tolist(), first.tolist(), last.tolist(), nonempty[row, first, 0].tolist(), strict=True))


def _group(runs: list[tuple[int, int, int, bool]]) -> list[_Span]:
    """Join adjacent short runs, and short gaps of fully masked queries between them; omit other masked queries."""
    spans: list[_Span] = []
    index = 0
    while index < len(runs):
        row, first, last, visible = runs[index]
        index += 1
        if not visible:
            continue
        count, following = 1, index
        while last - first < SHORT_RUN or count > 1:
            if following == len(runs) or runs[following][0] != row:
                break
            _, next_first, next_last, next_visible = runs[following]
            if next_last - next_first >= SHORT_RUN or next_last - first > TILE:
                break
            following += 1
            if next_visible:
                count, last, index = count + 1, next_last, following
        spans.append(_Span(row, first, last, count > 1))
    return spans


def _merge_irregular(spans: list[_Span], start: Tensor, stop: Tensor) -> list[_Span]:
    """Merge adjacent irregular spans that attend to almost the same range of keys, up to MAX_TILE queries."""
    merged: list[_Span] = []
    area, first_key, last_key = 0, 0, 0  # of the last merged span: the sum of its parts, and their range of keys
    for span in spans:
        if not span.irregular:
            merged.append(span)
            continue
        lasts = stop[span.row, span.first : span.last].amax(dim=1)
        low = int(start[span.row, span.first : span.last, 0][lasts > 0].min())
        high = int(lasts.max())
        own_area = (span.last - span.first) * (high - low)
        previous = merged[-1] if merged else None
        if previous and previous.irregular and previous.row == span.row and span.first - previous.last < SHORT_RUN:
            queries, union = span.last - previous.first, max(high, last_key) - min(low, first_key)
            if queries <= MAX_TILE and queries * union <= MERGE * (area + own_area):
                merged[-1] = previous._replace(last=span.last)
                area, first_key, last_key = area + own_area, min(low, first_key), max(high, last_key)
                continue
        merged.append(span)
        area, first_key, last_key = own_area, low, high
    return merged


def _describe(spans: list[_Span], start: Tensor, stop: Tensor) -> list[_Run]:
    """Return the intervals of runs and their steps."""
    if not spans:
        return []
    row, first, last, _ = (torch.tensor(column) for column in zip(*spans, strict=True))
    second = torch.minimum(first + 1, last - 1)
    starts, stops = start[row, first], stop[row, first]
    slides, grows = start[row, second] > starts, stop[row, second] > stops
    columns = (values.tolist() for values in (starts, stops, slides, grows))
    return [_drop_empty_intervals(span, *values) for span, *values in zip(spans, *columns, strict=True)]


def _drop_empty_intervals(
    span: _Span, start: list[int], stop: list[int], slides: list[bool], grows: list[bool]
) -> _Run:
    used = [k for k in range(len(start)) if stop[k] > start[k]]
    pick = [[values[k] for k in used] for values in (start, stop, slides, grows)]
    return _Run(span.row, span.first, span.last, *pick)  # type: ignore[arg-type]


def _growing_segments(run: _Run) -> list[Segment]:
    """Return the segments of a run without sliding intervals: a rectangle per interval, followed by a causal square if
    the interval grows. Rectangles with small gaps between them are joined, with one pattern for all queries."""
    segments: list[Segment] = []
    joined: list[tuple[int, int]] = []  # rectangles of the segment that is being joined
    for start, stop, grows in zip(run.start, run.stop, run.grows, strict=True):
        end = stop - 1 if grows else stop  # a square starts at the last key of the first query
        if end > start:
            if joined and start - joined[-1][1] > SMALL_GAP:
                segments.append(_joined_segment(joined))
                joined = []
            joined.append((start, end))
        if grows:
            segments.append(Segment(stop - 1, stop - 1 + run.length, causal=True))
    return [*segments, _joined_segment(joined)] if joined else segments


def _joined_segment(rectangles: list[tuple[int, int]]) -> Segment:
    """Return one segment for several ranges of keys, each visible to all queries: pattern bool [1, keys]."""
    first, last = rectangles[0][0], rectangles[-1][1]
    if len(rectangles) == 1:
        return Segment(first, last)
    starts, stops = torch.tensor(rectangles, dtype=torch.int32).unbind(1)
    return Segment(first, last, pattern=_pattern(starts[None], stops[None], first, last))


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
    the others become segments with a pattern. Fully masked queries do not count.
    """
    nonempty = stop > start
    visible_queries = int(nonempty[:, 0].sum())
    points, counts = _edges(start[nonempty], stop[nonempty])
    pieces: list[tuple[int, int, bool]] = []  # first, last, whether visible to all queries
    for first, last, count in zip(points, points[1:], counts, strict=False):
        unmasked = count == visible_queries and last - first >= MIN_UNMASKED_KEYS
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


def _edges(start: Tensor, stop: Tensor) -> tuple[list[int], list[int]]:
    """Return all different starts and stops of intervals, ascending, and the number of intervals that contain each."""
    edges = torch.cat([start, stop])
    signs = torch.ones(2, len(start), dtype=torch.int32)
    signs[1] = -1
    first, last = int(start.min()), int(stop.max())
    if len(edges) > (last - first) // 8:  # sorting many edges is slower than a sum over all keys
        index = edges - first
        change = torch.zeros(last - first + 1, dtype=torch.int32).index_add_(0, index, signs.flatten())
        points = torch.zeros(last - first + 1, dtype=torch.bool).index_fill_(0, index.long(), True).nonzero().squeeze(1)
        return (points + first).tolist(), change.cumsum(0)[points].tolist()
    values, index = edges.unique(return_inverse=True)
    change = torch.zeros(len(values), dtype=torch.int32).index_add_(0, index, signs.flatten())
    return values.tolist(), change.cumsum(0).tolist()


def _pattern(start: Tensor, stop: Tensor, first: int, last: int) -> Tensor:
    """Return which of the keys `[first, last)` are visible to each query: bool [n, last - first].

    A running sum along the keys of +1 at each start and -1 at each stop, in O(n (K + keys)).
    """
    queries, keys = len(start), last - first
    change = torch.zeros(queries, keys + 1, dtype=torch.int8)
    for edges, sign in ((start, 1), (stop, -1)):
        index = (edges - first).clamp_(0, keys).long()
        change.scatter_add_(1, index, torch.full((), sign, dtype=torch.int8).expand(index.shape))
    return change[:, :keys].cumsum(1, dtype=torch.int8).bool()
