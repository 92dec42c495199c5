"""The search for orders that receive fewer keys, and the option that trades balance against keys."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.config import ParallelConfig
from sightline.masks import AttentionMask, causal, document, sliding_window
from sightline.parallel import plan_context
from sightline.parallel.context.apply import shard_inputs
from sightline.parallel.context.orders import Costs, balanced
from sightline.parallel.context.plan import ContextPlan
from sightline.parallel.context.reassign import reassign
from sightline.parallel.mesh import Mesh


def lognormal(seed: int, length: int = 32768) -> AttentionMask:
    """Mask of one row of documents with lognormal lengths, median 300 and sigma 0.9."""
    normal = torch.randn(length, generator=torch.Generator().manual_seed(seed))
    lengths = (300 * (0.9 * normal).exp()).long().clamp(min=1)[:1000]
    return causal(1, length) & document(torch.repeat_interleave(torch.arange(1000), lengths)[None, :length].int())


def received(plan: ContextPlan) -> float:
    """Received keys as a fraction of those of an all-gather."""
    return int(plan.received_keys().sum()) / ((plan.degree - 1) * plan.shape[1])


def test_lognormal_rows_receive_few_keys() -> None:
    """Twenty layouts on 8 ranks: work, tokens, keys, and the lower bound."""
    fractions, ratios = [], []
    for seed in range(20):
        plan = plan_context(lognormal(seed), 8)
        work = plan.work().double()
        assert work.max() <= 1.05 * work.mean()
        assert all(plan.queries(rank).shape == (1, 4096) for rank in range(8))
        fractions.append(received(plan))
        ratios.append(int(plan.received_keys().sum()) / plan.least_keys())
        assert 1 <= ratios[-1] <= 2.2, (seed, ratios[-1])
    assert sum(fractions) / 20 <= 0.03
    assert sum(ratios) / 20 <= 1.5


def test_more_imbalance_saves_keys() -> None:
    keys, most, bounds = [], [], []
    for balance in (1.02, 1.05, 1.1, 1.3, 2.0):
        plans = [plan_context(lognormal(seed), 8, balance=balance) for seed in range(3)]
        work = torch.stack([plan.work() for plan in plans]).double()
        most.append(float((work.max(dim=1).values / work.mean(dim=1)).max()))
        assert most[-1] <= balance
        keys.append(sum(received(plan) for plan in plans))
        bounds.append(sum(plan.least_keys() for plan in plans))
    assert keys == sorted(keys, reverse=True) and keys[3] < 0.7 * keys[0]
    assert bounds == sorted(bounds, reverse=True)
    assert most[-1] > 1.1


@pytest.mark.parametrize("balance", [1.05, 1.3])
def test_the_option_reaches_the_plan(balance: float) -> None:
    mask = lognormal(0)
    parallel = ParallelConfig(context=8, context_balance=balance)
    mesh = SimpleNamespace(size=lambda axis: 8, index=lambda axis: 3, parallel=parallel)
    model = SimpleNamespace(
        layers={"0": SimpleNamespace(mask_name="full")},
        attention_shape=lambda name: (2,),
        per_token_inputs=lambda inputs: {},
        context_parallel_heads=None,
    )
    tokens = torch.arange(32768)[None]
    inputs: Any = shard_inputs({"tokens": tokens, "attention_masks": {"full": mask}}, model, cast(Mesh, mesh))
    assert torch.equal(inputs["tokens"], plan_context(mask, 8, layers=2, balance=balance).queries(3))


def test_plans_are_the_same_in_every_call() -> None:
    """Every rank computes its own plan; the state of global random generators must not change it."""
    first = plan_context(lognormal(0), 8)
    torch.manual_seed(1)
    second = plan_context(lognormal(0), 8)
    assert all((one == other).all() for one, other in zip(first.pieces, second.pieces, strict=True))


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 6), st.integers(1, 20), st.data())
def test_any_costs(degree: int, share: int, data: st.DataObject) -> None:
    """Tokens stay equal in number, no rank gets more than the limit or what it had, and cuts do not cost more."""
    length = degree * share
    work = data.draw(st.lists(st.sampled_from([0, 1, 2, 5, 50]), min_size=length, max_size=length))
    cut_keys = [0, *data.draw(st.lists(st.sampled_from([0, 0, 1, 2, 9]), min_size=length - 1, max_size=length - 1))]
    work_before = torch.tensor([0, *work]).cumsum(0).numpy()
    minima = [token for token in range(1, length) if cut_keys[token] < cut_keys[token - 1]]
    costs = Costs(work_before.data, torch.tensor(cut_keys).numpy().data, minima)
    limit = 1.1 * float(work_before[-1]) / degree
    before = balanced(costs, degree, 0.0)
    after = reassign(before, costs, degree, limit, 30)
    assert after[0][0] == 0 and after[-1][1] == length
    assert all(left[1] == right[0] and left[2] != right[2] for left, right in pairwise(after))

    def totals(pieces: list[tuple[int, int, int]], rank: int) -> tuple[int, int]:
        owned = [(first, last) for first, last, owner in pieces if owner == rank]
        return sum(last - first for first, last in owned), sum(sum(work[first:last]) for first, last in owned)

    most = max(totals(before, rank)[1] for rank in range(degree))
    for rank in range(degree):
        tokens, pairs = totals(after, rank)
        assert tokens == share and pairs <= max(limit, most)
    assert sum(cut_keys[first] for first, _, _ in after) <= sum(cut_keys[first] for first, _, _ in before)


def test_windows_and_padding_and_short_documents() -> None:
    """Rows that the search could make worse or slow: padding, documents of two tokens, windows."""
    length = 8192
    ids = torch.arange(length)[None] // 2
    ids[:, 4000:6000] = 4000
    ids[:, 6000:] = -1
    mask = causal(1, length) & document(ids.int())
    plan = plan_context({"full": mask, "window": mask & sliding_window(1, length, 64)}, 4)
    work = plan.work().double()
    assert work.max() <= 1.05 * work.mean()
    assert plan.least_keys() <= int(plan.received_keys().sum())


@pytest.mark.parametrize("value", [0.99, float("nan"), float("inf")])
def test_balance_must_be_at_least_one(value: float) -> None:
    with pytest.raises(ValueError, match=r"balance must be at least 1 and finite, got"):
        plan_context(causal(1, 8), 2, balance=value)
    with pytest.raises(ValueError, match=r"parallel.context.balance must be"):
        ParallelConfig(context_balance=value)
