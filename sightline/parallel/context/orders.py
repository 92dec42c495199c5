"""Orders: which rank owns which tokens of a row. Each owns S / degree tokens of every row, as queries and as keys.

An order of a row is a list of pieces `(first, last, rank)`: tokens [first, last) belong to `rank`. Pieces are sorted,
cover the row, and adjacent pieces have different ranks.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sightline.attention.tiles import TILE

Span = tuple[int, int]
Piece = tuple[int, int, int]

PROBES = 4  # of a window's work while it moves by its own length; more probes find no better cuts


def contiguous(length: int, degree: int) -> list[Piece]:
    """Rank r owns the r-th part of the row. Few keys are sent, but the end of a long document is the most work."""
    share = length // degree
    return [(rank * share, (rank + 1) * share, rank) for rank in range(degree)]


def headtail(length: int, degree: int) -> list[Piece]:
    """Rank r owns chunks r and 2 degree - 1 - r of 2 degree chunks: equal work for one causal document that fills the
    row. If S / degree is odd, the first chunk of a rank has one token more than the second."""
    share = length // degree
    tail = share // 2
    head = share - tail
    heads = [(rank * head, (rank + 1) * head, rank) for rank in range(degree)]
    tails = [(length - (rank + 1) * tail, length - rank * tail, rank) for rank in reversed(range(degree))]
    return merge_adjacent(heads + tails)


def roundrobin(length: int, degree: int) -> list[Piece]:
    """Assign blocks of 128 tokens, the tile of a kernel, in turn: striped attention (Brandon et al. 2023).

    Short rows have smaller blocks, so that a rank has at least four: a power of two that divides S / degree.
    """
    block = max(1, math.gcd(length // degree, 4 * TILE) // 4)
    return merge_adjacent([(first, first + block, first // block % degree) for first in range(0, length, block)])


class Costs(NamedTuple):
    """Costs of the tokens of a row.

    work_before  [S + 1], work of all tokens before each token
    cut_keys     [S], keys that must be sent if the row is cut before each token
    minima       the tokens at which `cut_keys` falls, ascending: a document ended before them, so cuts are cheapest
    """

    work_before: Sequence[int]
    cut_keys: Sequence[int]
    minima: Sequence[int]


def balanced(costs: Costs, degree: int, slack: float) -> list[Piece]:
    """Assign equal tokens and equal work to the ranks, in few pieces, cut where few keys must be sent.

    slack  work by which a rank may exceed the mean. It may exceed it by more if single tokens have more work than that

    Consider the row as a circle and slide a window of S / degree tokens around it. Averaged over all positions, its
    work is exactly the mean work per rank, so at some position it equals the mean. Assign that window to a rank, remove
    it and close the gap: the rest of the circle has the same mean, so the next window is found in the same way. Each
    window leaves at most one gap, so a rank has at most two pieces on average, for any documents.
    """
    length = len(costs.cut_keys)
    share = length // degree
    mean = costs.work_before[length] / degree
    stride = max(1, share // PROBES)
    circle: list[Span] = [(0, length)]
    windows: list[list[Span]] = []
    while len(windows) < degree - 1:
        circle, found = _Sweep(costs, share, mean, slack).run(circle, stride)
        windows += found
        circle = _rotated(circle, share)  # the next sweep covers the windows that cross the ends of this one
        if not found:  # between two probes the work may cross the mean twice; between adjacent tokens it cannot
            stride = max(1, stride // 2)
    windows = sorted(sorted(spans) for spans in [*windows, circle])  # adjacent windows go to adjacent ranks
    return merge_adjacent(sorted((*span, rank) for rank, spans in enumerate(windows) for span in spans))


class _Band(NamedTuple):
    """The accepted range of a window's work, and the mean work of the ranks that have no window yet."""

    low: float
    high: float
    target: float


class _Sweep:
    """One pass along the circle. Tokens that were passed and are not assigned form a stack of spans; the window is the
    last `share` tokens of the stack.

    first, last  the spans on the stack; the sweep is in the last one
    tokens       per span: tokens on the stack before token t of the span, minus t
    work         per span: work on the stack before token t of the span, minus work_before[t]
    """

    def __init__(self, costs: Costs, share: int, mean: float, slack: float) -> None:
        self.costs, self.share, self.mean, self.slack = costs, share, mean, slack
        self.first: list[int] = []
        self.last: list[int] = []
        self.tokens: list[int] = []
        self.work: list[int] = []

    def run(self, circle: list[Span], stride: int) -> tuple[list[Span], list[list[Span]]]:
        """Probe every `stride` tokens and take windows out until one is left. Returns the rest of the circle and the
        windows."""
        work_before = self.costs.work_before
        ranks = sum(last - first for first, last in circle) // self.share
        rest = sum(work_before[last] - work_before[first] for first, last in circle)
        band = self._band(rest, ranks)
        windows: list[list[Span]] = []
        excess = 0.0  # work of the last probed window above the target; 0 if none was probed yet
        for first, last in circle:
            self._push(first, last)
            end = first
            while end < last and ranks > 1:
                missing = self.share - (self.tokens[-1] + end)
                previous, previous_excess = end, excess
                end = min(last, end + (missing if missing > 0 else stride))
                if end - previous < missing:
                    continue
                work = self._window(end)[0]
                excess = work - band.target
                if band.low <= work <= band.high or excess * previous_excess < 0:
                    end = self._best_end(previous if previous_excess else end, end, band)
                    spans, work = self._take(end)
                    windows.append(spans)
                    ranks, rest, excess = ranks - 1, rest - work, 0.0
                    band = self._band(rest, ranks)
                    if end < last:
                        self._push(end, last)
        return _not_empty(zip(self.first, self.last, strict=True)), windows

    def _band(self, rest: int, ranks: int) -> _Band:
        """Return the band for the next of `ranks` ranks that share the work `rest`. It leaves the other ranks at most
        half of the slack above the mean."""
        target = rest / ranks
        low = max(self.mean - self.slack, rest - (ranks - 1) * (self.mean + self.slack / 2))
        # If single tokens have much work, earlier windows may have moved the target out of the slack; accept it anyway.
        return _Band(min(low, target), max(self.mean + self.slack, target), target)

    def _push(self, first: int, last: int) -> None:
        """Continue the sweep in the span [first, last)."""
        tokens, work = -first, -self.costs.work_before[first]
        if self.first:
            tokens += self.tokens[-1] + self.last[-1]
            work += self.work[-1] + self.costs.work_before[self.last[-1]]
        self.first.append(first)
        self.last.append(last)
        self.tokens.append(tokens)
        self.work.append(work)

    def _take(self, end: int) -> tuple[list[Span], int]:
        """Remove the window that ends at `end` from the stack and return its spans and its work."""
        work, span, token = self._window(end)
        self.last[-1] = end
        spans = _not_empty(zip([token, *self.first[span + 1 :]], self.last[span:], strict=True))
        for field in (self.first, self.last, self.tokens, self.work):
            del field[span + 1 :]
        self.last[span] = token
        return spans, work

    def _window(self, end: int) -> tuple[int, int, int]:
        """Return the work of the window that ends at `end` in the last span, and its start: span and token."""
        first, tokens, work_before = self.first, self.tokens, self.costs.work_before
        start = tokens[-1] + end - self.share
        span = len(first) - 1
        while first[span] + tokens[span] > start:
            span -= 1
        token = start - tokens[span]
        return self.work[-1] + work_before[end] - self.work[span] - work_before[token], span, token

    def _best_end(self, first: int, last: int, band: _Band) -> int:
        """Return the best end of the window in [first, last]: its work is in the band and few keys must be sent."""

        def price(end: int) -> tuple[float, int, int]:
            work, span, token = self._window(end)
            keys = self._cut_keys(end, self.last[-1]) + self._cut_keys(token, self.first[span])
            return max(0, band.low - work, work - band.high), keys, end

        _, span, token = self._window(first)
        ahead = first - token
        ends = [first, last, *self._minima(first, last)]
        ends += [start + ahead for start in self._minima(token, min(last - ahead, self.last[span]))]
        best = min(map(price, ends))
        if best[0] > 0:
            best = min(map(price, self._crossing(first, last, band)))
        return best[2]

    def _crossing(self, first: int, last: int, band: _Band) -> list[int]:
        """Find an end in the band by bisection. If a single token crosses the whole band, return the ends before and
        after it."""
        above = self._window(first)[0] > band.target
        while last - first > 1:
            middle = (first + last) // 2
            work = self._window(middle)[0]
            if band.low <= work <= band.high:
                return [middle]
            if (work > band.target) == above:
                first = middle
            else:
                last = middle
        return [first, last]

    def _minima(self, first: int, last: int) -> Sequence[int]:
        """The cheapest cuts in (first, last]."""
        minima = self.costs.minima
        return minima[bisect_right(minima, first) : bisect_right(minima, last)]

    def _cut_keys(self, token: int, edge: int) -> int:
        """Keys that must be sent for a cut before a token; 0 at the edge of a span, where the row is already cut."""
        return 0 if token == edge else self.costs.cut_keys[token]


def _not_empty(spans: Iterable[Span]) -> list[Span]:
    return [(first, last) for first, last in spans if first < last]


def _rotated(circle: list[Span], share: int) -> list[Span]:
    """The same circle with its last `share` tokens first."""
    back, front = list(circle), []
    while share:
        first, last = back.pop()
        middle = max(first, last - share)
        front.append((middle, last))
        share -= last - middle
        if first < middle:
            back.append((first, middle))
    return front[::-1] + back


def merge_adjacent(pieces: list[Piece]) -> list[Piece]:
    """Drop empty pieces from a sorted list and merge adjacent pieces of one rank."""
    merged: list[Piece] = []
    for first, last, rank in pieces:
        if merged and merged[-1][2] == rank:
            merged[-1] = (merged[-1][0], last, rank)
        elif first < last:
            merged.append((first, last, rank))
    return merged
