"""Orders: which rank owns which tokens of a row. Each owns S / degree tokens of every row, as queries and as keys.

An order of a row is a list of pieces `(first, last, rank)`: tokens [first, last) belong to `rank`. Pieces are sorted,
cover the row, and neighbours differ in rank.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sightline.attention.tiles import TILE

Span = tuple[int, int]
Piece = tuple[int, int, int]

PROBES = 4  # at a window's work while it moves by its own length; more find no better cuts


def contiguous(length: int, degree: int) -> list[Piece]:
    """Rank r owns the r-th part of the row. Few keys travel, but the rank with a long document's end works most."""
    share = length // degree
    return [(rank * share, (rank + 1) * share, rank) for rank in range(degree)]


def headtail(length: int, degree: int) -> list[Piece]:
    """Of 2 degree chunks rank r owns numbers r and 2 degree - 1 - r: equal work for one causal document that fills the
    row. Where the share of a rank is odd, heads are one token longer than tails."""
    share = length // degree
    tail = share // 2
    head = share - tail
    heads = [(rank * head, (rank + 1) * head, rank) for rank in range(degree)]
    tails = [(length - (rank + 1) * tail, length - rank * tail, rank) for rank in reversed(range(degree))]
    return _joined(heads + tails)


def roundrobin(length: int, degree: int) -> list[Piece]:
    """Blocks of 128 tokens are dealt out in turn: striped attention (Brandon et al. 2023), in whole tiles of a kernel.
    Short rows have smaller blocks, so that a rank gets four, and the block is a power of two that divides its share."""
    block = max(1, math.gcd(length // degree, 4 * TILE) // 4)
    return _joined([(first, first + block, first // block % degree) for first in range(0, length, block)])


class Costs(NamedTuple):
    """What the tokens of a row cost.

    before  [S + 1], work of all tokens before each token
    cut     [S], keys that travel when the row is cut before each token
    ends    the tokens where `cut` falls, in order: documents end there, and a cut is cheapest
    """

    before: Sequence[int]
    cut: Sequence[int]
    ends: Sequence[int]


def balanced(costs: Costs, degree: int, slack: float) -> list[Piece]:
    """Equal tokens and equal work in few pieces, cut where few keys travel.

    slack: work by which a rank may pass the mean. Where single tokens cost more than that, so may a rank.

    See the row as a circle. A window of S / degree tokens that slides once around it has, on the average of all its
    places, exactly the mean work; so somewhere it has the mean work. That window is one rank's share. Take it out,
    close the gap, and the circle that is left has the same mean: the next share is somewhere in it. A window leaves
    one gap at most, so a rank has no more than two pieces on the average, whatever the documents.
    """
    length = len(costs.cut)
    share = length // degree
    mean = costs.before[length] / degree
    stride = max(1, share // PROBES)
    circle: list[Span] = [(0, length)]
    shares: list[list[Span]] = []
    while len(shares) < degree - 1:
        circle, found = _Sweep(costs, share, mean, slack).run(circle, stride)
        shares += found
        circle = _rotated(circle, share)  # the windows across the ends of this walk lie inside the next
        if not found:  # between two looks the work may have passed the mean and come back; between neighbours not
            stride = max(1, stride // 2)
    shares = sorted(sorted(spans) for spans in [*shares, circle])  # neighbours in the row are neighbours in rank
    return _joined(sorted((*span, rank) for rank, spans in enumerate(shares) for span in spans))


class _Band(NamedTuple):
    """The work that a share may have, and what the ranks still without one have on the average."""

    low: float
    high: float
    target: float


class _Sweep:
    """One walk along the circle. What was passed and given to no rank lies on a stack of spans; the last `share` tokens
    of the stack are the window.

    first, last   the spans on the stack; the walk is in the last one
    tokens, work  of each span, what to add to a token t of it and to before[t] for all that lies on the stack below t
    """

    def __init__(self, costs: Costs, share: int, mean: float, slack: float) -> None:
        self.costs, self.share, self.mean, self.slack = costs, share, mean, slack
        self.first: list[int] = []
        self.last: list[int] = []
        self.tokens: list[int] = []
        self.work: list[int] = []

    def run(self, circle: list[Span], stride: int) -> tuple[list[Span], list[list[Span]]]:
        """Look every `stride` tokens and take shares out, until one is left: the circle then, and the shares."""
        before = self.costs.before
        ranks = sum(last - first for first, last in circle) // self.share
        rest = sum(before[last] - before[first] for first, last in circle)
        band = self._band(rest, ranks)
        shares: list[list[Span]] = []
        over = 0.0  # by how much the window of the last look was over the target; 0 where there was none
        for first, last in circle:
            self._push(first, last)
            at = first
            while at < last and ranks > 1:
                missing = self.share - (self.tokens[-1] + at)
                previous, over_before = at, over
                at = min(last, at + (missing if missing > 0 else stride))
                if at - previous < missing:
                    continue
                work = self._window(at)[0]
                over = work - band.target
                if band.low <= work <= band.high or over * over_before < 0:
                    at = self._best_end(previous if over_before else at, at, band)
                    spans, work = self._take(at)
                    shares.append(spans)
                    ranks, rest, over = ranks - 1, rest - work, 0.0
                    band = self._band(rest, ranks)
                    if at < last:
                        self._push(at, last)
        return _not_empty(zip(self.first, self.last, strict=True)), shares

    def _band(self, rest: int, ranks: int) -> _Band:
        """For the next of `ranks` ranks that divide `rest`. The others may have to take half of the slack, no more."""
        target = rest / ranks
        low = max(self.mean - self.slack, rest - (ranks - 1) * (self.mean + self.slack / 2))
        # Where single tokens are large, shares so far may have drawn the target out of the slack; it is right anyway.
        return _Band(min(low, target), max(self.mean + self.slack, target), target)

    def _push(self, first: int, last: int) -> None:
        """Walk on in a span."""
        tokens, work = -first, -self.costs.before[first]
        if self.first:
            tokens += self.tokens[-1] + self.last[-1]
            work += self.work[-1] + self.costs.before[self.last[-1]]
        self.first.append(first)
        self.last.append(last)
        self.tokens.append(tokens)
        self.work.append(work)

    def _take(self, at: int) -> tuple[list[Span], int]:
        """Take the window that ends at `at` off the stack: its spans and its work."""
        work, span, token = self._window(at)
        self.last[-1] = at
        spans = _not_empty(zip([token, *self.first[span + 1 :]], self.last[span:], strict=True))
        for side in (self.first, self.last, self.tokens, self.work):
            del side[span + 1 :]
        self.last[span] = token
        return spans, work

    def _window(self, at: int) -> tuple[int, int, int]:
        """The window that ends at `at` in the last span: its work, the span it begins in, and the token there."""
        first, tokens, before = self.first, self.tokens, self.costs.before
        below = tokens[-1] + at - self.share
        span = len(first) - 1
        while first[span] + tokens[span] > below:
            span -= 1
        token = below - tokens[span]
        return self.work[-1] + before[at] - self.work[span] - before[token], span, token

    def _best_end(self, first: int, last: int, band: _Band) -> int:
        """Where from `first` to `last` the window best ends: its work in the band, and cut where few keys travel."""

        def price(at: int) -> tuple[float, int, int]:
            work, span, token = self._window(at)
            keys = self._keys_cut(at, self.last[-1]) + self._keys_cut(token, self.first[span])
            return max(0, band.low - work, work - band.high), keys, at

        _, span, token = self._window(first)
        ahead = first - token
        places = [first, last, *self._ends(first, last)]
        places += [end + ahead for end in self._ends(token, min(last - ahead, self.last[span]))]
        best = min(map(price, places))
        if best[0] > 0:
            best = min(map(price, self._crossing(first, last, band)))
        return best[2]

    def _crossing(self, first: int, last: int, band: _Band) -> list[int]:
        """A place in the band, found by halving; where a single token leaps over it, the places on both sides."""
        over = self._window(first)[0] > band.target
        while last - first > 1:
            middle = (first + last) // 2
            work = self._window(middle)[0]
            if band.low <= work <= band.high:
                return [middle]
            if (work > band.target) == over:
                first = middle
            else:
                last = middle
        return [first, last]

    def _ends(self, first: int, last: int) -> Sequence[int]:
        """Ends of documents in (first, last]."""
        ends = self.costs.ends
        return ends[bisect_right(ends, first) : bisect_right(ends, last)]

    def _keys_cut(self, token: int, edge: int) -> int:
        """Keys that travel for a cut before a token; none more at the edge of a span, where the row is cut already."""
        return 0 if token == edge else self.costs.cut[token]


def _not_empty(spans: Iterable[Span]) -> list[Span]:
    return [(first, last) for first, last in spans if first < last]


def _rotated(circle: list[Span], share: int) -> list[Span]:
    """The same circle, its last `share` tokens first."""
    back, front = list(circle), []
    while share:
        first, last = back.pop()
        middle = max(first, last - share)
        front.append((middle, last))
        share -= last - middle
        if first < middle:
            back.append((first, middle))
    return front[::-1] + back


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Sorted pieces without empty ones, neighbours of one rank made one."""
    joined: list[Piece] = []
    for first, last, rank in pieces:
        if joined and joined[-1][2] == rank:
            joined[-1] = (joined[-1][0], last, rank)
        elif first < last:
            joined.append((first, last, rank))
    return joined
