"""Orders: which rank owns which tokens of a row. Every rank owns S / degree tokens of every row, as query and as key.

An order is a list of pieces `(first, last, rank)`: tokens [first, last) of the row belong to `rank`. Pieces are sorted,
cover the row, and neighbours differ in rank.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

Piece = tuple[int, int, int]
Span = tuple[int, int]

TILE = 128  # queries of a kernel's tile
TOLERANCE = 0.02  # of the mean work, by which a rank may have more
LOOKS = 16  # at the window's work while it moves by its own length


def contiguous(length: int, degree: int) -> list[Piece]:
    """Rank r owns the r-th part of the row. Few keys travel, but the last rank of a long document works most."""
    share = length // degree
    return [(rank * share, (rank + 1) * share, rank) for rank in range(degree)]


def headtail(length: int, degree: int) -> list[Piece]:
    """2 degree chunks, rank r owns chunks r and 2 degree - 1 - r: equal work for one causal document that fills the row.

    Where the share is odd, heads are one token longer than tails.
    """
    share = length // degree
    tail = share // 2
    head = share - tail
    heads = [(rank * head, (rank + 1) * head, rank) for rank in range(degree)]
    tails = [(length - (rank + 1) * tail, length - rank * tail, rank) for rank in reversed(range(degree))]
    return _joined(heads + tails)


def roundrobin(length: int, degree: int) -> list[Piece]:
    """Blocks of 128 tokens are dealt out in turn: striped attention (Brandon et al. 2023), in whole tiles of a kernel.

    Where 128 does not divide the share, blocks are the largest power of two that does.
    """
    block = math.gcd(length // degree, TILE)
    return _joined([(first, first + block, first // block % degree) for first in range(0, length, block)])


class Costs(NamedTuple):
    """What cutting a row costs. Sequences of Python integers.

    before  [S + 1], work of the tokens before each token
    cut     [S], keys that travel when the row is cut before a token
    ends    the tokens where `cut` falls, in order: cuts are cheapest there, documents end there
    """

    before: Sequence[int]
    cut: Sequence[int]
    ends: Sequence[int]


def balanced(costs: Costs, degree: int, slack: float) -> list[Piece]:
    """Equal tokens and equal work in few pieces, cut where few keys travel.

    slack: work by which a rank may pass the mean.

    See the row as a circle. A window of S / degree tokens that slides once around it has, on the average over all its
    places, exactly the mean work; so somewhere it has the mean work. That window is a rank's share. Take it out, close
    the gap, and the circle that is left has the same mean: the next share is somewhere in it. Every window leaves one
    gap at most, so a rank has two pieces on the average, whatever the documents.
    """
    length = len(costs.cut)
    share = length // degree
    circle: list[Span] = [(0, length)]
    shares: list[list[Span]] = []
    stride = max(1, share // LOOKS)
    while len(shares) < degree - 1:
        sweep = _Sweep(costs, share, slack, costs.before[-1] / degree)
        circle, found = sweep.run(circle, stride)
        shares += found
        circle = _rotated(circle, share)
        if not found:  # between two looks the window's work may have passed the mean and come back
            stride = max(1, stride // 2)
    shares.append(circle)
    shares = sorted(sorted(spans) for spans in shares)  # neighbours in the row are neighbours in rank
    return _joined(sorted((*span, rank) for rank, spans in enumerate(shares) for span in spans))


class _Sweep:
    """One walk along the circle. What was passed and not given to a rank lies on a stack of spans, and the last `share`
    tokens of the stack are the window.

    first, last   the spans on the stack; the walk is in the last one
    tokens, work  what lies on the stack below each span
    """

    def __init__(self, costs: Costs, share: int, slack: float, mean: float) -> None:
        self.costs, self.share, self.slack, self.mean = costs, share, slack, mean
        self.first: list[int] = []
        self.last: list[int] = []
        self.tokens: list[int] = []
        self.work: list[int] = []

    def run(self, circle: list[Span], stride: int) -> tuple[list[Span], list[list[Span]]]:
        """Take shares out of the circle, looking every `stride` tokens: what is left of it, and the shares."""
        before = self.costs.before
        ranks = sum(last - first for first, last in circle) // self.share
        rest = sum(before[last] - before[first] for first, last in circle)
        shares: list[list[Span]] = []
        low, high, target = self._band(rest, ranks)
        for first, last in circle:
            self._push(first, last)
            at, gap = first, 0.0  # gap: by how much the window at `at` is over the target
            while at < last and ranks > 1:
                missing = self.share - self.tokens[-1] - (at - self.first[-1])
                previous, gap_before = at, gap
                at = min(last, at + (missing if missing > 0 else stride))
                if at - previous < missing:
                    continue
                work = self._window(at)[0]
                gap = work - target
                if low <= work <= high or gap * gap_before < 0:
                    at = self._best_end(previous if gap_before else at, at, low, high, target)
                    spans, work = self._take(at)
                    shares.append(spans)
                    rest, ranks, gap = rest - work, ranks - 1, 0.0
                    low, high, target = self._band(rest, ranks)
                    if at < last:
                        self._push(at, last)
        return list(zip(self.first, self.last, strict=True)), shares

    def _band(self, rest: int, ranks: int) -> tuple[float, float, float]:
        """Least and greatest work of the next share, and what it should be, where `ranks` have to share the rest.

        The least leaves the others no more than half of the slack each.
        """
        least = max(self.mean - self.slack, rest - (ranks - 1) * (self.mean + self.slack / 2))
        return least, self.mean + self.slack, rest / ranks

    def _push(self, first: int, last: int) -> None:
        tokens = work = 0
        if self.first:
            before = self.costs.before
            tokens = self.tokens[-1] + self.last[-1] - self.first[-1]
            work = self.work[-1] + before[self.last[-1]] - before[self.first[-1]]
        self.first.append(first)
        self.last.append(last)
        self.tokens.append(tokens)
        self.work.append(work)

    def _window(self, at: int) -> tuple[int, int, int]:
        """The window that ends at `at` in the last span: its work, the span it begins in, and the token."""
        before = self.costs.before
        begin = self.tokens[-1] + at - self.first[-1] - self.share
        span = len(self.tokens) - 1
        while self.tokens[span] > begin:
            span -= 1
        token = self.first[span] + begin - self.tokens[span]
        above = self.work[-1] + before[at] - before[self.first[-1]]
        return above - self.work[span] - (before[token] - before[self.first[span]]), span, token

    def _best_end(self, first: int, last: int, low: float, high: float, target: float) -> int:
        """Where from `first` to `last` the window ends best: with work in the band, and cut where few keys travel."""
        _, span, token = self._window(first)
        shift = first - token
        candidates = [first, *self._crossing(first, last, target), *self._ends(first, last)]
        candidates += [end + shift for end in self._ends(token, min(token + last - first, self.last[span]))]

        def price(at: int) -> tuple[float, int, int]:
            work, span, token = self._window(at)
            keys = self._cut(at, self.last[-1]) + self._cut(token, self.first[span])
            return max(low - work, work - high, 0), keys, at

        return min(candidates, key=price)

    def _crossing(self, first: int, last: int, target: float) -> tuple[int, int]:
        """Two neighbouring places with the target between their windows' work, by bisection."""
        over = self._window(first)[0] > target
        while last - first > 1:
            middle = (first + last) // 2
            if (self._window(middle)[0] > target) == over:
                first = middle
            else:
                last = middle
        return first, last

    def _ends(self, first: int, last: int) -> Sequence[int]:
        """Where cuts are cheapest in (first, last]."""
        ends = self.costs.ends
        return ends[bisect_right(ends, first) : bisect_right(ends, last)]

    def _cut(self, token: int, edge: int) -> int:
        """Keys that travel for a cut before a token; none at the edge of a span, where the row is cut already."""
        return 0 if token == edge else self.costs.cut[token]

    def _take(self, at: int) -> tuple[list[Span], int]:
        """Take the window that ends at `at` off the stack: its spans and its work."""
        work, span, token = self._window(at)
        self.last[-1] = at
        spans = list(zip([token, *self.first[span + 1 :]], self.last[span:], strict=True))
        for side in (self.first, self.last, self.tokens, self.work):
            del side[span + 1 :]
        self.last[span] = token
        return [(first, last) for first, last in spans if first < last], work


def _rotated(circle: list[Span], share: int) -> list[Span]:
    """The same circle from another place: its last `share` tokens come first."""
    spans, missing = list(circle), share
    front: list[Span] = []
    while missing:
        first, last = spans.pop()
        middle = max(first, last - missing)
        front.insert(0, (middle, last))
        missing -= last - middle
        if middle > first:
            spans.append((first, middle))
    return front + spans


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Sorted pieces, neighbours of one rank made one."""
    joined: list[Piece] = []
    for first, last, rank in pieces:
        if joined and joined[-1][2] == rank:
            joined[-1] = (joined[-1][0], last, rank)
        elif last > first:
            joined.append((first, last, rank))
    return joined
