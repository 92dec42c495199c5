"""Local search for an assignment of documents to ranks with fewer received keys, from one that is balanced already."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import numpy as np

from sightline.parallel.context.orders import Costs, Piece, Span, merge_adjacent
from sightline.parallel.context.transfers import Integers

GRAIN = 64  # spans shorter than 1 / GRAIN of a rank's tokens move together with a neighbor, so that pools stay small
MOST_SAMPLES = 32  # arrangements of a pool that are compared in the last round; the first rounds compare few
MOST_ENTRIES = 4096  # arrangements x spans of a pool


def reassign(pieces: list[Piece], costs: Costs, degree: int, limit: float, rounds: int) -> list[Piece]:
    """Exchange documents between ranks, so that fewer keys are received.

    Each round pools the spans of two ranks, arranges them in random order on a circle of 2 S / degree tokens, and cuts
    the circle into two halves: one cut is between two spans, where it costs nothing, the other S / degree tokens later.
    The cheapest of several such cuts within the work limit replaces the two ranks' spans if it costs no more than they
    do. So the numbers of tokens stay equal, and neither keys nor work above the limit can grow. The random numbers are
    the same in every call: all ranks compute the same result.

    pieces  a balanced order
    limit   work that a rank may have; a rank that exceeds it already keeps its own work as the limit
    rounds  number of pairs of ranks to try
    """
    search = _Search(pieces, costs, degree, limit)
    draws = search.random.random((rounds, 2)).tolist()
    for turn, (one, other) in enumerate(draws):
        if not any(search.keys):
            break
        search.step(one, other, 4 + (MOST_SAMPLES - 4) * turn // rounds)
    spans = sorted((*span, rank) for rank, owned in enumerate(search.owned) for span in owned)
    return merge_adjacent(spans)


class _Search:
    """State of the search.

    owned  the spans of each rank; between two spans, the row can be cut at no cost or is cut already
    keys   keys that each rank receives, if it receives them for each of its spans separately
    work   work of each rank
    """

    def __init__(self, pieces: list[Piece], costs: Costs, degree: int, limit: float) -> None:
        self.work_before: Integers = np.asarray(costs.work_before)
        self.cut_keys: Integers = np.append(np.asarray(costs.cut_keys), 0)
        self.share = (len(self.cut_keys) - 1) // degree
        self.limit = limit
        self.costs = costs  # single entries of a memoryview are faster than those of an array
        self.random = np.random.default_rng(0)
        self.owned = self._split_at_free_cuts(pieces, degree)
        self.keys = [self._sum_cut_keys(spans) for spans in self.owned]
        self.work = [self._sum_work(spans) for spans in self.owned]

    def step(self, one: float, other: float, samples: int) -> None:
        """Try to improve two ranks, chosen by two random numbers in [0, 1): the first in proportion to its keys."""
        keys, work, owned = self.keys, self.work, self.owned
        a = bisect_right(list(accumulate(keys)), int(one * sum(keys)))
        b = (a + 1 + int(other * (len(owned) - 1))) % len(owned)
        pool = self._joined(owned[a] + owned[b])
        uncut = self._sum_cut_keys(pool)
        total = work[a] + work[b]
        most = max(self.limit, work[a], work[b])
        halves = self._best_halves(pool, keys[a] + keys[b] - uncut, total, most, samples)
        if halves is None:
            return
        for rank, spans in zip((a, b), halves, strict=True):
            owned[rank], keys[rank], work[rank] = spans, self._sum_cut_keys(spans), self._sum_work(spans)

    def _best_halves(
        self, pool: list[Span], budget: int, total: int, most: float, samples: int
    ) -> tuple[list[Span], list[Span]] | None:
        """Return the cheapest halves of the pool, or None if the cuts need more than `budget` keys.

        total  work of the pool, of which a half may have at most `most`
        """
        circle = 2 * self.share
        first, last = np.array(pool).T
        shape = min(samples, max(1, MOST_ENTRIES // len(pool))), len(pool)
        order = self.random.random(shape).argsort(axis=1, kind="stable")
        last = last[order]
        length = last - first[order]
        ends = length.cumsum(axis=1)
        work_before, cut_keys = self.work_before, self.cut_keys
        work_to = (work_before[last] - work_before[first[order]]).cumsum(axis=1).ravel()
        # One cut is at the end of each span. The other is half a circle away, `left` tokens before the end of a span.
        base = np.arange(shape[0])[:, None] * circle
        opposite = ((ends + self.share) % circle + base).ravel()
        ends = (ends + base).ravel()
        span = ends.searchsorted(opposite, side="right")
        left = ends[span] - opposite
        end = last.ravel()[span]
        token = end - left
        cut = cut_keys[token] * (left < length.ravel()[span])
        half = work_to[span] - work_before[end] + work_before[token] - work_to
        cut[np.abs(2 * np.abs(half) - total) > 2 * most - total] = budget + 1
        best = int(cut.argmin())
        if cut[best] > budget:
            return None
        sample = best // len(pool)
        start = min(int(ends[best]), int(opposite[best])) - sample * circle
        return _halves([pool[index] for index in order[sample]], start % self.share, self.share)

    def _split_at_free_cuts(self, pieces: list[Piece], degree: int) -> list[list[Span]]:
        """Return the spans of each rank, split where the row can be cut at no cost. Of runs of tokens that attend to
        nothing before them, such as padding, only the ends count, and of very short documents only some."""
        free = self.cut_keys[:-1] == 0
        inner = np.zeros_like(free)
        inner[1:-1] = free[:-2] & free[1:-1] & free[2:]
        cuts = np.flatnonzero(free & ~inner)
        grain = max(1, self.share // GRAIN)
        gaps = np.diff(cuts, append=len(free))
        cells = np.diff(cuts // grain, prepend=-1)
        cuts = cuts[(cells > 0) | (gaps >= grain)]
        owned: list[list[Span]] = [[] for _ in range(degree)]
        for first, last, rank in pieces:
            within = cuts[cuts.searchsorted(first, side="right") : cuts.searchsorted(last)].tolist()
            owned[rank] += zip([first, *within], [*within, last], strict=True)
        return owned

    def _joined(self, spans: list[Span]) -> list[Span]:
        """Sort spans and join those that were cut at a cost."""
        joined: list[Span] = []
        for first, last in sorted(spans):
            if joined and joined[-1][1] == first and self.costs.cut_keys[first]:
                joined[-1] = (joined[-1][0], last)
            else:
                joined.append((first, last))
        return joined

    def _sum_cut_keys(self, spans: list[Span]) -> int:
        cut_keys = self.costs.cut_keys
        return sum(cut_keys[first] for first, _ in spans)

    def _sum_work(self, spans: list[Span]) -> int:
        work_before = self.costs.work_before
        return sum(work_before[last] - work_before[first] for first, last in spans)


def _halves(spans: list[Span], start: int, share: int) -> tuple[list[Span], list[Span]]:
    """Return the `share` tokens from `start` on, in the order of the spans, and all others."""
    inside: list[Span] = []
    outside: list[Span] = []
    position = 0
    for first, last in spans:
        low = min(last, max(first, first + start - position))
        high = min(last, max(first, first + start + share - position))
        position += last - first
        for part, target in (((first, low), outside), ((low, high), inside), ((high, last), outside)):
            if part[0] < part[1]:
                target.append(part)
    return inside, outside
