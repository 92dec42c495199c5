"""The context-parallel plan: owners, needed keys, transfers. The reference is the dense mask."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sightline.masks import AttentionMask, causal, chunked, document, global_tokens, shared_prefix, sliding_window
from sightline.parallel import plan_context
from sightline.parallel.context.orders import Costs, balanced, contiguous, headtail, roundrobin
from sightline.parallel.context.plan import ORDERS, ContextPlan, received_length
from tests.support.random_masks import assert_canonical, dense_rules, expressions, packed_rows

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1]], dtype=torch.int32)


def packed(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """document_ids and positions int32 [1, S] of documents of these lengths."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return ids[None].int(), positions[None].int()


def lognormal(length: int, median: float, seed: int) -> list[int]:
    """Log-normal document lengths that fill a row."""
    normal = torch.randn(length, generator=torch.Generator().manual_seed(seed))
    lengths, left = [], length
    for value in (median * normal.exp()).long().clamp(min=1).tolist():
        lengths.append(min(value, left))
        left -= lengths[-1]
        if left == 0:
            break
    return lengths


def pieces_of(plan: ContextPlan, row: int = 0) -> list[tuple[int, int, int]]:
    """(first, last, rank) in the order of the row."""
    in_row = plan.pieces.row == row
    return [tuple(piece) for piece in zip(*(field[in_row].tolist() for field in plan.pieces[1:4]), strict=True)]


def assert_valid(plan: ContextPlan, name: str, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Check the shards of a mask against the dense mask. Returns visible pairs and received keys, int64 [degree]."""
    rows, length, _ = dense.shape
    degree, share = plan.degree, length // plan.degree
    shards = [plan.shard(rank, name) for rank in range(degree)]
    owned = [plan.queries(rank) for rank in range(degree)]
    assert torch.equal(torch.cat(owned, dim=1).sort(dim=1).values, torch.arange(length).expand(rows, length))
    pairs, received = torch.zeros(2, degree, dtype=torch.int64)
    for rank, shard in enumerate(shards):
        assert shard.mask.shape[:2] == (rows, share)
        assert shard.send.shape[:2] == shard.receive.shape[:2] == (rows, degree)
        assert (owned[rank].diff(dim=1) > 0).all() and owned[rank].shape == (rows, share)
        assert_canonical(shard.mask)
        most_needed = max(int(dense[row, owned[rank][row]].any(dim=0).sum()) for row in range(rows))
        assert shard.mask.key_length == received_length(most_needed, share)
        for row in range(rows):
            local_dense = dense[row, owned[rank][row]]
            needed = local_dense.any(dim=0).nonzero().flatten()
            buffer = torch.full((shard.mask.key_length,), -1)
            for peer in range(degree):
                sent, index = shards[peer].send[row, rank], shard.receive[row, peer]
                assert (sent.diff() > 0)[sent[1:] >= 0].all() and (
                    (sent >= 0) == (sent >= 0).sort(descending=True)[0]
                ).all()
                sent, index = sent[sent >= 0], index[index >= 0]
                assert sent.shape == index.shape
                buffer[index] = owned[peer][row][sent]
                received[rank] += 0 if peer == rank else len(sent)
            # The received keys are exactly the needed ones, in row order.
            assert torch.equal(buffer[: len(needed)], needed) and (buffer[len(needed) :] == -1).all()
            over_received = shard.mask[row].to_dense()[0]
            assert torch.equal(over_received[:, : len(needed)], local_dense[:, needed])
            assert not over_received[:, len(needed) :].any()
            pairs[rank] += local_dense.sum()
    return pairs, received


@settings(max_examples=60, deadline=None)
@given(expressions(), st.sampled_from(ORDERS), st.data())
def test_any_mask_in_any_order(pair: tuple[AttentionMask, Tensor], order: str, data: st.DataObject) -> None:
    mask, dense = pair
    length = mask.shape[1]
    degree = data.draw(st.sampled_from([d for d in range(1, length + 1) if length % d == 0]))
    plan = plan_context(mask, degree, order)
    pairs, received = assert_valid(plan, "attention", dense)
    assert torch.equal(plan.work(), pairs)
    assert torch.equal(plan.received_keys(), received)
    assert (received <= dense.shape[0] * (length - length // degree)).all(), "receives more than an all-gather would"


@settings(max_examples=15, deadline=None)
@given(packed_rows(max_rows=2), st.data())
def test_several_masks_share_owners_but_not_shards(rows, data: st.DataObject) -> None:
    rules = dense_rules(rows, window=5, chunk=4)
    names = data.draw(st.lists(st.sampled_from(sorted(rules)), min_size=2, max_size=3, unique=True))
    length = rows.shape[1]
    degree = data.draw(st.sampled_from([d for d in range(1, length + 1) if length % d == 0]))
    layers = {name: data.draw(st.integers(0, 40)) for name in names}
    plan = plan_context({name: rules[name][0] for name in names}, degree, layers=layers)
    counts = [assert_valid(plan, name, rules[name][1]) for name in names]
    assert torch.equal(plan.work(), sum(pairs for pairs, _ in counts))
    assert torch.equal(plan.received_keys(), sum(received for _, received in counts))


def test_fixed_orders() -> None:
    assert contiguous(12, 3) == [(0, 4, 0), (4, 8, 1), (8, 12, 2)]
    assert headtail(12, 3) == [(0, 2, 0), (2, 4, 1), (4, 8, 2), (8, 10, 1), (10, 12, 0)]
    assert headtail(9, 3) == [(0, 2, 0), (2, 4, 1), (4, 7, 2), (7, 8, 1), (8, 9, 0)]  # heads of 2 and tails of 1
    assert roundrobin(8, 2) == [(i, i + 1, i % 2) for i in range(8)]
    assert roundrobin(2048, 2) == [(128 * i, 128 * i + 128, i % 2) for i in range(16)]
    assert roundrobin(96, 2) == [(4 * i, 4 * i + 4, i % 2) for i in range(24)]  # 48 tokens per rank: 12 blocks of 4
    for order in (contiguous, headtail, roundrobin):
        assert order(5, 1) == [(0, 5, 0)]


def test_balanced_equals_headtail_for_one_causal_document() -> None:
    assert pieces_of(plan_context(causal(1, 16), 4)) == headtail(16, 4)
    assert plan_context(causal(1, 16), 4).work().tolist() == [34, 34, 34, 34]


def test_balanced_does_not_cut_equal_documents() -> None:
    ids, _ = packed([256] * 8)
    plan = plan_context(causal(1, 2048) & document(ids), 4)
    assert pieces_of(plan) == contiguous(2048, 4)
    assert plan.received_keys().tolist() == [0, 0, 0, 0]


def test_small_plan() -> None:
    """Documents of 3 and 4 tokens and one token of padding. Rank 0 owns tokens 0 to 3, so rank 1 needs token 3, the
    first of the second document; the padding needs none."""
    plan = plan_context(causal(1, 8) & document(DOCUMENTS), 2, "contiguous")
    assert plan.queries(0).tolist() == [[0, 1, 2, 3]] and plan.queries(1).tolist() == [[4, 5, 6, 7]]
    assert plan.work().tolist() == [1 + 2 + 3 + 1, 2 + 3 + 4]
    assert plan.received_keys().tolist() == [0, 1]
    assert plan.sent_keys().tolist() == [[0, 1], [0, 0]]
    shard = plan.shard(1)
    mask, send, receive = shard.mask, shard.send, shard.receive
    assert mask.start.tolist() == [[[0], [0], [0], [0]]] and mask.stop.tolist() == [[[2], [3], [4], [0]]]
    assert send.tolist() == [[[-1, -1, -1], [0, 1, 2]]]
    assert receive.tolist() == [[[0, -1, -1], [1, 2, 3]]]
    shard = plan.shard(0)
    mask, send, receive = shard.mask, shard.send, shard.receive
    assert mask.stop.tolist() == [[[1], [2], [3], [4]]] and mask.start.tolist() == [[[0], [0], [0], [3]]]
    assert send.tolist() == [[[0, 1, 2, 3], [3, -1, -1, -1]]]
    assert receive.tolist() == [[[0, 1, 2, 3], [-1, -1, -1, -1]]]


def test_intervals_that_become_adjacent_among_received_keys_are_merged() -> None:
    """A sink and a window: keys between them are not sent, so the sink's key is next to those of the window."""
    sink = torch.zeros(1, 12, dtype=torch.bool)
    sink[0, 0] = True
    plan = plan_context((sliding_window(1, 12, 2) | global_tokens(sink)) & causal(1, 12), 2, "contiguous")
    mask = plan.shard(1).mask
    assert plan.received_keys().tolist() == [0, 2]
    assert mask.intervals == 2 and mask.start[0, 0].tolist() == [0, 0] and mask.stop[0, 0].tolist() == [3, 0]


LAYOUTS = {
    "lognormal": lambda length: lognormal(length, 300, seed=0),
    "long": lambda length: [length // 2, *lognormal(length // 2, 100, seed=1)],
    "short": lambda length: [length // 64 - 1] * 64 + [64],
}


@pytest.mark.parametrize(("length", "degree"), [(32768, 8), (131072, 64)])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", ["full", "window", "chunk", "prompts"])
def test_balanced_order_has_equal_work_few_keys_and_few_pieces(
    length: int, degree: int, layout: str, rule: str
) -> None:
    lengths = LAYOUTS[layout](length)
    ids, positions = packed(lengths)
    full = causal(1, length) & document(ids)
    other = {
        "full": full,
        "window": sliding_window(1, length, 128) & document(ids),
        "chunk": chunked(positions, 2048) & full,
        "prompts": shared_prefix(ids, ids - ids % 5) & causal(1, length),
    }[rule]
    layers = {"full": 1, "other": 3}
    plan = plan_context({"full": full, "other": other}, degree, layers=layers)
    pairs = [layers[name] * mask.take_queries(plan.queries(rank)).visible_pairs().sum()
             for rank in range(degree) for name, mask in plan.masks.items()]  # fmt: skip
    work = torch.stack(pairs).view(degree, 2).sum(dim=1).double()
    assert work.max() / work.mean() <= 1.05
    assert len(plan.pieces.rank) <= len(lengths) + 2 * degree
    for rank in range(degree):
        assert plan.queries(rank).shape == (1, length // degree)
    if layout != "long":
        all_gather = 2 * (degree - 1) * length
        assert plan.received_keys().sum() <= 0.15 * all_gather


@settings(max_examples=40, deadline=None)
@given(expressions(max_rows=1), st.data())
def test_work_differs_by_few_tokens_if_they_cost_more_than_the_slack(pair, data: st.DataObject) -> None:
    mask, dense = pair
    degree = data.draw(st.sampled_from([d for d in range(1, mask.shape[1] + 1) if mask.shape[1] % d == 0]))
    work = plan_context(mask, degree).work().double()
    token = float(dense.sum(dim=2).max())
    # A window misses its target by at most one token, which is spread over the targets of the windows after it.
    assert work.max() <= 1.05 * work.mean() + token * (1 + math.log(degree))


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 8), st.integers(1, 12), st.sampled_from([0.0, 0.02, 0.2]), st.data())
def test_balanced_terminates_for_any_costs(degree: int, share: int, slack: float, data: st.DataObject) -> None:
    """Even if a few tokens have nearly all the work, so that no window is near the mean."""
    length = degree * share
    work = data.draw(st.lists(st.sampled_from([0, 0, 1, 5, 1000]), min_size=length, max_size=length))
    cut_keys = data.draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
    minima = [token for token in range(1, length) if cut_keys[token] < cut_keys[token - 1]]
    pieces = balanced(Costs([0, *accumulate(work)], cut_keys, minima), degree, slack * sum(work) / degree)
    assert [first for first, _, _ in pieces] == [0, *(last for _, last, _ in pieces[:-1])] and pieces[-1][1] == length
    assert all(left[2] != right[2] for left, right in pairwise(pieces)) and len(pieces) <= 2 * degree
    for rank in range(degree):
        assert sum(last - first for first, last, owner in pieces if owner == rank) == share


def test_each_row_is_balanced_separately() -> None:
    """A pipeline may split a batch into single rows."""
    rows = [packed(lognormal(4096, median, seed=2))[0] for median in (30, 300, 1000)]
    ids = torch.cat([*rows, torch.full_like(rows[0], -1)])
    mask = causal(4, 4096) & document(ids)
    plan = plan_context(mask, 4)
    most = [
        max(int(mask[row].take_queries(plan.queries(rank)[row]).visible_pairs()) for rank in range(4))
        for row in range(4)
    ]
    mean = mask.visible_pairs() / 4
    assert (torch.tensor(most) <= mean + 0.05 * mean.mean() + 1).all()


def test_masks_are_weighted_by_their_layers() -> None:
    """The full mask alone gives the head-tail order, the window alone nearly contiguous parts."""
    masks = {"full": causal(1, 4096), "window": sliding_window(1, 4096, 64)}
    assert pieces_of(plan_context(masks, 4, layers={"full": 1, "window": 0})) == headtail(4096, 4)
    assert len(pieces_of(plan_context(masks, 4, layers={"full": 0, "window": 1}))) <= 5


def test_received_lengths_have_few_values() -> None:
    assert received_length(0, 4096) == received_length(1, 4096) == 1024
    assert received_length(4097, 4096) == 5120
    assert received_length(130, 100) == 256
    assert len({received_length(needed, 2048) for needed in range(131073)}) == 256


def test_errors() -> None:
    with pytest.raises(
        ValueError, match=r"rows of 30 tokens are not divisible by 4 context ranks.*28 or 32.*degrees: 3 or 5"
    ):
        plan_context(causal(1, 30), 4)
    with pytest.raises(ValueError, match=r"nearest lengths: 4; nearest degrees: 3"):
        plan_context(causal(1, 3), 4)
    with pytest.raises(
        ValueError, match="unknown order 'zigzag'; the orders are balanced, contiguous, headtail, roundrobin"
    ):
        plan_context(causal(1, 8), 2, "zigzag")
    with pytest.raises(ValueError, match=r"one shape.*\(1, 8, 8\).*\(1, 6, 6\)"):
        plan_context({"a": causal(1, 8), "b": causal(1, 6)}, 2)
    with pytest.raises(ValueError, match="with Q = T"):
        plan_context(AttentionMask.from_dense(torch.ones(1, 8, 4, dtype=torch.bool)), 2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        plan_context(causal(1, 8), 0)
    with pytest.raises(ValueError, match="at least one mask"):
        plan_context({}, 2)
    with pytest.raises(ValueError, match=r"layers has the names \['full'\]; expected .* \['attention'\]"):
        plan_context(causal(1, 8), 2, layers={"full": 3})
    with pytest.raises(ValueError, match="no mask named 'full'"):
        plan_context(causal(1, 8), 2).shard(0, "full")
    two = plan_context({"a": causal(1, 8), "b": causal(1, 8)}, 2)
    with pytest.raises(ValueError, match=r"no mask named None; its masks are \['a', 'b'\]"):
        two.shard(0)
    assert plan_context({"a": causal(1, 8)}, 2).shard(0).mask.equal(two.shard(0, "a").mask)


def test_example_of_the_documentation() -> None:
    page = (Path(__file__).parents[3] / "docs" / "context_parallel.md").read_text()
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    plan = names["plan"]
    assert plan.queries(0).shape == (1, 1024) and plan.sent_keys().shape == (4, 4)
    assert plan.work().sum() == sum(len(d) * (len(d) + 1) // 2 for d in names["documents"])
    assert plan.work().max() <= 1.05 * plan.work().double().mean()
    assert names["shard"].mask.shape[:2] == (1, 1024)
