"""The lower bound of received keys, against all assignments of the tokens of short rows to ranks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.masks import AttentionMask, causal, document, prefix_lm, sliding_window
from sightline.parallel import plan_context
from sightline.parallel.context.bound import least_keys
from tests.support.random_masks import expressions


def partitions(tokens: tuple[int, ...], share: int) -> Iterator[list[tuple[int, ...]]]:
    """All partitions of the tokens into groups of `share` tokens, without regard to the order of the groups."""
    if not tokens:
        yield []
        return
    for rest in combinations(tokens[1:], share - 1):
        others = tuple(token for token in tokens[1:] if token not in rest)
        for groups in partitions(others, share):
            yield [(tokens[0], *rest), *groups]


def all_assignments(length: int, degree: int) -> np.ndarray:
    """bool [N, degree, length]: the tokens of each rank, for every assignment of equal numbers of tokens."""
    groups = np.array(list(partitions(tuple(range(length)), length // degree)))
    return np.eye(length, dtype=bool)[groups].any(axis=2)


SHAPES = [(6, 2), (8, 2), (10, 2), (6, 3), (9, 3), (8, 4)]
ASSIGNMENTS = {shape: all_assignments(*shape) for shape in SHAPES}


def assert_true_bound(mask: AttentionMask, work: np.ndarray, length: int, degree: int) -> dict[int, tuple[int, int]]:
    """Check the bound for every limit on work that matters. Returns for each limit the bound and the least keys."""
    owned = ASSIGNMENTS[length, degree]
    dense = mask.to_dense()[0].numpy()
    received = ((owned.astype(int) @ dense.astype(int) > 0) & ~owned).sum(axis=(1, 2))
    most = (owned @ work).max(axis=1)
    found = {}
    for limit in np.unique(most):
        bound, least = least_keys(mask, work, degree, float(limit)), int(received[most <= limit].min())
        assert bound <= least, (limit, bound, least)
        found[int(limit)] = bound, least
    return found


@st.composite
def short_rows(draw: st.DrawFn) -> tuple[tuple[int, int], torch.Tensor, torch.Tensor]:
    length, degree = draw(st.sampled_from(SHAPES))
    ids = draw(st.lists(st.booleans(), min_size=length - 1, max_size=length - 1))
    ids = torch.tensor([False, *ids]).cumsum(0)[None].int()
    positions = torch.tensor([[int((ids[0, :token] == ids[0, token]).sum()) for token in range(length)]])
    return (length, degree), ids, positions


@settings(max_examples=60, deadline=None)
@given(short_rows(), st.integers(1, 4), st.integers(0, 2))
def test_no_assignment_receives_fewer_keys(rows, window: int, layers: int) -> None:
    """Each mask alone, with the work of two masks, one of them of `layers` layers."""
    (length, degree), ids, positions = rows
    full = causal(1, length) & document(ids)
    prefix = document(ids) & (causal(1, length) | prefix_lm(positions, positions * 0 + 2))
    local = sliding_window(1, length, window) & document(ids)
    for mask, other in ((full, local), (prefix, local), (local, full)):
        work = [pair.to_dense()[0].sum(dim=1).numpy() for pair in (mask, other)]
        assert_true_bound(mask, work[0] + layers * work[1], length, degree)


@settings(max_examples=25, deadline=None)
@given(expressions(max_rows=1), st.sampled_from([1, 3]))
def test_no_assignment_receives_fewer_keys_for_any_mask(pair, heavy: int) -> None:
    mask, dense = pair
    for length, degree in SHAPES:
        if mask.shape[1] >= length:
            short = AttentionMask.from_dense(dense[:, :length, :length])
            work = dense[0, :length, :length].sum(dim=1).numpy()
            work[0] *= heavy
            assert_true_bound(short, work, length, degree)


def test_the_bound_of_one_document_on_two_ranks() -> None:
    """The last 3 tokens have work 27 of 55, the last 4 have 34, the last 5 have 40, and a rank has 5 tokens."""
    found = assert_true_bound(causal(1, 10), np.arange(1, 11), 10, 2)
    assert {bound for limit, (bound, _) in found.items() if limit < 34} == {7}
    assert {bound for limit, (bound, _) in found.items() if 34 <= limit < 40} == {6}
    assert found[40] == (5, 5)


@pytest.mark.parametrize("balance", [1.02, 1.05, 1.1, 1.3])
def test_plans_receive_little_more_than_the_bound(balance: float) -> None:
    """One document of half a row among short ones."""
    lengths = [4096, *[64] * 64]
    ids = torch.repeat_interleave(torch.arange(65), torch.tensor(lengths))[None].int()
    plan = plan_context(causal(1, 8192) & document(ids), 4, balance=balance)
    bound = plan.least_keys()
    assert 0 < bound <= int(plan.received_keys().sum()) <= 1.3 * bound
