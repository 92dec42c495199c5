"""Lower bound of the keys that must be received if no rank may have more work than a limit.

Let a document be a run of tokens that attend to all tokens of the run before them. A rank whose last token of it is
e - 1 needs the keys [0, e) of the document, so the document costs the sum of these ends e over its ranks, except the
one that has its last token. Let G be the j ranks with the greatest ends, and e the next end. G has all tokens from e
on, S / degree tokens per rank, and at most j times the limit of work. Subtract a price p from the work of each token:

    sum of (work - p) over [e, length)  <=  j (limit - p S / degree)  +  sum of (p - work) over the other tokens of G

With p = 0: a document with more work than j ranks may have is cut, and its later part needs all keys before it. With
p > 0: a rank with costly tokens also needs cheap ones, since all ranks have equally many tokens, and they are scarce.
The last sum is at most, for each document,

    one that costs no keys                   max(0, its sum of (p - work)), since G has all of it or none
    one that costs c keys                    p c more than that: if G lacks its end, G has at most c tokens; if G has
                                             it, the others have tokens among the first c (`_key_price` is the factor)
    one whose cost is counted by its ends,
    and each token that is in no document    its sum of max(0, p - work)

The documents whose cost is not counted by their ends cost c keys together. So the bound is the least value, over c, of
c plus the least ends for this c. Each price and each choice of the counted documents give a bound; take the greatest.
All other documents may be divided at will here, so plans do not quite reach the bound.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sightline.masks import AttentionMask
from sightline.parallel.context.transfers import Integers

PRICES = (0.0, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.7, 1.0)  # as fractions of the work limit per token
COST_STEPS = 64  # values of c that are compared
MOST_COUNTED = 8  # documents counted by their ends if p > 0; with p = 0, any number


class Documents(NamedTuple):
    """Tokens [first, last) of a row, the document with the most work first, and whether each token is in a document."""

    first: Integers
    last: Integers
    covered: NDArray[np.bool_]


def least_keys(mask: AttentionMask, work: Integers, degree: int, limit: float) -> int:
    """Return the keys of a mask of one row that `degree` ranks receive at least.

    work   int64 [S], work of each token
    limit  work that a rank may have at most
    """
    found = _find_documents(mask, work)
    share = len(work) // degree
    prices = sorted({round(fraction * limit / share) for fraction in PRICES} - {0})
    bounds = [_with_price(found, work, degree, limit, price) for price in prices]
    return max(_without_price(found, work, degree, limit), *bounds, 0)


def _without_price(found: Documents, work: Integers, degree: int, limit: float) -> int:
    """Return the bound for p = 0: that of each document alone, added up."""
    total = 0
    for first, last in zip(found.first, found.last, strict=True):
        ends = int(_Ends(work[first:last], degree, len(work) // degree, limit, 0).least(0).sum())
        if not ends:
            break  # the documents after it have less work
        total += ends
    return total


def _with_price(found: Documents, work: Integers, degree: int, limit: float, price: int) -> int:
    """Return the bound for p = `price`: the greatest for the first 1, 2, ... documents counted by their ends."""
    bound, share = 0, len(work) // degree
    excess = work - price
    whole = np.array([-excess[first:last].sum() for first, last in zip(found.first, found.last, strict=True)])
    cheap = np.maximum(-excess, 0)
    supply = float(cheap[~found.covered].sum() + np.maximum(whole, 0).sum())
    key_price = _key_price(found, excess, whole, price)
    ends: list[_Ends] = []
    for first, last, gain in zip(found.first[:MOST_COUNTED], found.last, whole, strict=False):
        supply += float(cheap[first:last].sum() - max(0, gain))
        ends.append(_Ends(excess[first:last], degree, share, limit - price * share, supply))
        if not ends[-1].least(supply).any():
            break  # it can be whole, so it only adds supply, and so do documents with less work
        bound = max(bound, _least_total(ends, supply, key_price))
    return bound


class _Ends:
    """Least ends of one document.

    suffix  sum of (work - price) from each token to the end of the document, negated and increasing
    """

    def __init__(self, excess: Integers, degree: int, share: int, budget: float, supply: float) -> None:
        suffix = np.append(excess[::-1].cumsum()[::-1], 0)
        self.suffix = -np.minimum.accumulate(suffix)
        ranks = np.arange(1, degree)
        self.budgets = ranks * budget + 1e-6  # of 1, 2, ... ranks
        self.tokens = np.maximum(0, len(excess) - ranks * share)
        needed = self.least(supply) > 0  # all later supplies are greater
        self.budgets, self.tokens = self.budgets[needed], self.tokens[needed]

    def least(self, supply: float | NDArray[np.float64]) -> Integers:
        """Least ends before those of 1, 2, ... ranks: int64 [..., degree - 1], without those that are 0 anyway."""
        return np.maximum(self.suffix.searchsorted(-(self.budgets + supply)), self.tokens)


def _least_total(ends: list[_Ends], supply: float, key_price: float) -> int:
    """Return the least sum of c, the cost of the documents that are not in `ends`, and of all ends.

    Between two compared values of c, the lower one counts for c and the higher one for the ends.
    """
    most = sum(int(document.least(supply).sum()) for document in ends)
    costs = most * np.arange(COST_STEPS + 1) // COST_STEPS
    supplies = (supply + key_price * costs[1:, None]).astype(np.float64)
    totals = costs[:-1] + sum(document.least(supplies).sum(axis=1) for document in ends)
    return min(most, int(totals.min()))


def _key_price(documents: Documents, excess: Integers, whole: Integers, price: int) -> float:
    """Return by how much the sum of (price - work) that a document gives grows at most with each key that it costs."""
    greatest = float(price)
    above = np.maximum(excess, 0)
    for first, last, gain in zip(documents.first, documents.last, whole, strict=True):
        if last - first > 1:
            given = above[first : last - 1].cumsum() - max(0, -gain)
            greatest = max(greatest, float((given / np.arange(1, last - first)).max()))
    return greatest


def _find_documents(mask: AttentionMask, work: Integers) -> Documents:
    """Return the runs of tokens that attend to all tokens of the run before them and to themselves."""
    token = np.arange(len(work))
    start, stop = mask.start[0].numpy(), mask.stop[0].numpy()
    own = np.where((start <= token[:, None]) & (token[:, None] < stop), start, -1).max(axis=1)
    edges = np.flatnonzero(np.diff(own, prepend=-2))
    first, last = edges, np.append(edges[1:], len(work))
    valid = own[first] == first
    first, last = first[valid], last[valid]
    covered = np.zeros(len(work), dtype=bool)
    for one, other in zip(first, last, strict=True):
        covered[one:other] = True
    before = np.append(0, work.cumsum())
    order = np.argsort(before[first] - before[last], kind="stable")
    return Documents(first[order], last[order], covered)
