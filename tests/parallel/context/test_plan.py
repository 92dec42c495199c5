"""The context-parallel plan: who owns, who needs, who sends. The dense mask, token by token, is the truth."""

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
    """Lengths of documents that fill a row."""
    drawn = torch.randn(length, generator=torch.Generator().manual_seed(seed))
    lengths, left = [], length
    for value in (median * drawn.exp()).long().clamp(min=1).tolist():
        lengths.append(min(value, left))
        left -= lengths[-1]
        if left == 0:
            break
    return lengths


def pieces_of(plan: ContextPlan, row: int = 0) -> list[tuple[int, int, int]]:
    """(first, last, rank) in the order of the row."""
    at = plan.pieces.row == row
    return [tuple(piece) for piece in zip(*(side[at].tolist() for side in plan.pieces[1:4]), strict=True)]


def assert_sound(plan: ContextPlan, name: str, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Everything that a plan promises of one mask. Returns pairs and received keys, int64 [degree], counted here."""
    rows, length, _ = dense.shape
    degree, share = plan.degree, length // plan.degree
    views = [plan.shard(rank, name) for rank in range(degree)]
    owned = [plan.queries(rank) for rank in range(degree)]
    assert torch.equal(torch.cat(owned, dim=1).sort(dim=1).values, torch.arange(length).expand(rows, length))
    pairs, received = torch.zeros(2, degree, dtype=torch.int64)
    for rank, view in enumerate(views):
        assert view.mask.shape[:2] == (rows, share) and view.send.shape[:2] == view.receive.shape[:2] == (rows, degree)
        assert (owned[rank].diff(dim=1) > 0).all() and owned[rank].shape == (rows, share)
        assert_canonical(view.mask)
        neediest = max(int(dense[row, owned[rank][row]].any(dim=0).sum()) for row in range(rows))
        assert view.mask.key_length == received_length(neediest, share)
        for row in range(rows):
            mine = dense[row, owned[rank][row]]
            needed = mine.any(dim=0).nonzero().flatten()
            buffer = torch.full((view.mask.key_length,), -1)
            for peer in range(degree):
                sent, place = views[peer].send[row, rank], view.receive[row, peer]
                assert (sent.diff() > 0)[sent[1:] >= 0].all() and (
                    (sent >= 0) == (sent >= 0).sort(descending=True)[0]
                ).all()
                sent, place = sent[sent >= 0], place[place >= 0]
                assert sent.shape == place.shape
                buffer[place] = owned[peer][row][sent]
                received[rank] += 0 if peer == rank else len(sent)
            # What has come is every needed key and nothing else, in the order of the row.
            assert torch.equal(buffer[: len(needed)], needed) and (buffer[len(needed) :] == -1).all()
            local = view.mask[row].to_dense()[0]
            assert torch.equal(local[:, : len(needed)], mine[:, needed]) and not local[:, len(needed) :].any()
            pairs[rank] += mine.sum()
    return pairs, received


@settings(max_examples=60, deadline=None)
@given(expressions(), st.sampled_from(ORDERS), st.data())
def test_any_mask_in_any_order(pair: tuple[AttentionMask, Tensor], order: str, data: st.DataObject) -> None:
    mask, dense = pair
    length = mask.shape[1]
    degree = data.draw(st.sampled_from([d for d in range(1, length + 1) if length % d == 0]))
    plan = plan_context(mask, degree, order)
    pairs, received = assert_sound(plan, "attention", dense)
    assert torch.equal(plan.work(), pairs)
    assert torch.equal(plan.received_keys(), received)
    assert (received <= dense.shape[0] * (length - length // degree)).all(), "more than an all-gather"


@settings(max_examples=15, deadline=None)
@given(packed_rows(max_rows=2), st.data())
def test_several_masks_share_the_owners_and_have_views_of_their_own(rows, data: st.DataObject) -> None:
    rules = dense_rules(rows, window=5, chunk=4)
    names = data.draw(st.lists(st.sampled_from(sorted(rules)), min_size=2, max_size=3, unique=True))
    length = rows.shape[1]
    degree = data.draw(st.sampled_from([d for d in range(1, length + 1) if length % d == 0]))
    layers = {name: data.draw(st.integers(0, 40)) for name in names}
    plan = plan_context({name: rules[name][0] for name in names}, degree, layers=layers)
    counts = [assert_sound(plan, name, rules[name][1]) for name in names]
    assert torch.equal(plan.work(), sum(pairs for pairs, _ in counts))
    assert torch.equal(plan.received_keys(), sum(received for _, received in counts))


def test_orders_are_what_they_say() -> None:
    assert contiguous(12, 3) == [(0, 4, 0), (4, 8, 1), (8, 12, 2)]
    assert headtail(12, 3) == [(0, 2, 0), (2, 4, 1), (4, 8, 2), (8, 10, 1), (10, 12, 0)]
    assert headtail(9, 3) == [(0, 2, 0), (2, 4, 1), (4, 7, 2), (7, 8, 1), (8, 9, 0)]  # heads of 2 and tails of 1
    assert roundrobin(8, 2) == [(at, at + 1, at % 2) for at in range(8)]
    assert roundrobin(2048, 2) == [(128 * at, 128 * at + 128, at % 2) for at in range(16)]
    assert roundrobin(96, 2) == [(4 * at, 4 * at + 4, at % 2) for at in range(24)]  # 48 tokens a rank are 12 fours
    for order in (contiguous, headtail, roundrobin):
        assert order(5, 1) == [(0, 5, 0)]


def test_balanced_is_headtail_for_one_causal_document() -> None:
    assert pieces_of(plan_context(causal(1, 16), 4)) == headtail(16, 4)
    assert plan_context(causal(1, 16), 4).work().tolist() == [34, 34, 34, 34]


def test_balanced_keeps_equal_documents_whole() -> None:
    ids, _ = packed([256] * 8)
    plan = plan_context(causal(1, 2048) & document(ids), 4)
    assert pieces_of(plan) == contiguous(2048, 4)
    assert plan.received_keys().tolist() == [0, 0, 0, 0]


def test_a_plan_by_hand() -> None:
    """Documents of 3 and 4 tokens and one of padding. Rank 0 owns tokens 0 to 3, so rank 1 needs token 3, the first of
    the second document, and the padding nothing."""
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


def test_far_intervals_that_meet_among_the_received_keys_become_one() -> None:
    """A sink and a window: what lies between is not sent, so the sink's key lies next to the window's."""
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
def test_balanced_work_few_keys_few_pieces(length: int, degree: int, layout: str, rule: str) -> None:
    ids, positions = packed(LAYOUTS[layout](length))
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
    assert work.max() / work.mean() <= 1.025
    assert len(plan.pieces.rank) <= 2 * degree
    for rank in range(degree):
        assert plan.queries(rank).shape == (1, length // degree)
    if layout != "long":
        everything = 2 * (degree - 1) * length
        assert plan.received_keys().sum() <= 0.15 * everything


@settings(max_examples=40, deadline=None)
@given(expressions(max_rows=1), st.data())
def test_work_differs_by_single_tokens_where_they_cost_more_than_the_slack(pair, data: st.DataObject) -> None:
    mask, dense = pair
    degree = data.draw(st.sampled_from([d for d in range(1, mask.shape[1] + 1) if mask.shape[1] % d == 0]))
    work = plan_context(mask, degree).work().double()
    token = float(dense.sum(dim=2).max())
    # A share misses its target by a token at most, and the targets of those after it move by that over their number.
    assert work.max() <= 1.02 * work.mean() + token * (1 + math.log(degree))


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 8), st.integers(1, 12), st.sampled_from([0.0, 0.02, 0.2]), st.data())
def test_balanced_ends_whatever_tokens_cost(degree: int, share: int, slack: float, data: st.DataObject) -> None:
    """Also where a few tokens are nearly all the work, so that no share is near the mean."""
    length = degree * share
    work = data.draw(st.lists(st.sampled_from([0, 0, 1, 5, 1000]), min_size=length, max_size=length))
    cut = data.draw(st.lists(st.integers(0, 3), min_size=length, max_size=length))
    ends = [token for token in range(1, length) if cut[token] < cut[token - 1]]
    pieces = balanced(Costs([0, *accumulate(work)], cut, ends), degree, slack * sum(work) / degree)
    assert [first for first, _, _ in pieces] == [0, *(last for _, last, _ in pieces[:-1])] and pieces[-1][1] == length
    assert all(one[2] != other[2] for one, other in pairwise(pieces)) and len(pieces) <= 2 * degree
    for rank in range(degree):
        assert sum(last - first for first, last, owner in pieces if owner == rank) == share


def test_every_row_is_balanced_by_itself() -> None:
    """A pipeline cuts a batch into its rows."""
    rows = [packed(lognormal(4096, median, seed=2))[0] for median in (30, 300, 1000)]
    ids = torch.cat([*rows, torch.full_like(rows[0], -1)])
    mask = causal(4, 4096) & document(ids)
    plan = plan_context(mask, 4)
    most = [
        max(int(mask[row].take_queries(plan.queries(rank)[row]).visible_pairs()) for rank in range(4))
        for row in range(4)
    ]
    mean = mask.visible_pairs() / 4
    assert (torch.tensor(most) <= mean + 0.02 * mean.mean() + 1).all()


def test_layers_weigh_the_masks() -> None:
    """Under the full mask alone head and tail are dealt out; under the window alone, runs. Layers decide."""
    masks = {"full": causal(1, 4096), "window": sliding_window(1, 4096, 64)}
    assert pieces_of(plan_context(masks, 4, layers={"full": 1, "window": 0})) == headtail(4096, 4)
    assert len(pieces_of(plan_context(masks, 4, layers={"full": 0, "window": 1}))) <= 5


def test_received_lengths_are_few() -> None:
    assert received_length(0, 4096) == received_length(1, 4096) == 1024
    assert received_length(4097, 4096) == 5120
    assert received_length(130, 100) == 256
    assert len({received_length(needed, 2048) for needed in range(131073)}) == 256


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"rows of 30 tokens .* 4 context ranks.*28 or 32.*degrees: 3 or 5"):
        plan_context(causal(1, 30), 4)
    with pytest.raises(ValueError, match=r"nearest lengths: 4; nearest degrees: 3"):
        plan_context(causal(1, 3), 4)
    with pytest.raises(
        ValueError, match="no order named 'zigzag'; there are balanced, contiguous, headtail, roundrobin"
    ):
        plan_context(causal(1, 8), 2, "zigzag")
    with pytest.raises(ValueError, match=r"one shape.*\(1, 8, 8\).*\(1, 6, 6\)"):
        plan_context({"a": causal(1, 8), "b": causal(1, 6)}, 2)
    with pytest.raises(ValueError, match="as many keys as queries"):
        plan_context(AttentionMask.from_dense(torch.ones(1, 8, 4, dtype=torch.bool)), 2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        plan_context(causal(1, 8), 0)
    with pytest.raises(ValueError, match="at least one mask"):
        plan_context({}, 2)
    with pytest.raises(ValueError, match=r"layers names \['full'\], the masks are \['attention'\]"):
        plan_context(causal(1, 8), 2, layers={"full": 3})
    with pytest.raises(ValueError, match="no mask named 'full'"):
        plan_context(causal(1, 8), 2).shard(0, "full")
    two = plan_context({"a": causal(1, 8), "b": causal(1, 8)}, 2)
    with pytest.raises(ValueError, match=r"no mask named None was planned; there are \['a', 'b'\]"):
        two.shard(0)
    assert plan_context({"a": causal(1, 8)}, 2).shard(0).mask.equal(two.shard(0, "a").mask)


def test_the_example_of_the_page() -> None:
    page = (Path(__file__).parents[3] / "docs" / "context_parallel.md").read_text()
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    plan = names["plan"]
    assert plan.queries(0).shape == (1, 1024) and plan.sent_keys().shape == (4, 4)
    assert plan.work().sum() == sum(len(d) * (len(d) + 1) // 2 for d in names["documents"])
    assert plan.work().max() <= 1.02 * plan.work().double().mean()
    assert names["shard"].mask.shape[:2] == (1, 1024)
