"""The context-parallel plan against the dense mask: who owns, who needs, who sends."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sightline.masks import AttentionMask
from sightline.parallel import plan_context
from sightline.parallel.context.plan import ORDERS, ContextPlan
from tests.masks.random_masks import assert_canonical, expressions


def divisors(length: int) -> list[int]:
    return [degree for degree in range(1, length + 1) if length % degree == 0]


def assert_sound(plan: ContextPlan, name: str, dense: Tensor) -> tuple[Tensor, Tensor]:
    """Everything a plan promises of one mask, seen token by token. Returns pairs and received keys, int64 [degree]."""
    rows, length, _ = dense.shape
    degree, share = plan.degree, length // plan.degree
    views = [plan.view(rank, name) for rank in range(degree)]
    owned = [plan.queries(rank) for rank in range(degree)]
    pairs, received = torch.zeros(degree, dtype=torch.int64), torch.zeros(degree, dtype=torch.int64)
    for rank, view in enumerate(views):
        assert view.mask.shape[:2] == (rows, share) and view.send.shape[:2] == view.receive.shape[:2] == (rows, degree)
        assert_canonical(view.mask)
        for row in range(rows):
            mine = dense[row, owned[rank][row]]
            needed = mine.any(dim=0).nonzero().flatten()
            buffer = torch.full((view.mask.key_length,), -1)
            for peer in range(degree):
                sent = views[peer].send[row, rank]
                place = view.receive[row, peer]
                sent, place = sent[sent >= 0], place[place >= 0]
                assert sent.shape == place.shape
                assert (sent.diff() > 0).all()
                buffer[place] = owned[peer][row][sent]
                received[rank] += 0 if peer == rank else len(sent)
            # every needed key has come, nothing else, in the order of the row
            assert torch.equal(buffer[: len(needed)], needed) and (buffer[len(needed) :] == -1).all()
            local = view.mask[row].to_dense()[0]
            assert torch.equal(local[:, : len(needed)], mine[:, needed]) and not local[:, len(needed) :].any()
            pairs[rank] += mine.sum()
    return pairs, received


@settings(max_examples=150, deadline=None)
@given(expressions(), st.sampled_from(ORDERS), st.data())
def test_any_mask_in_any_order(pair: tuple[AttentionMask, Tensor], order: str, data: st.DataObject) -> None:
    mask, dense = pair
    length = mask.shape[1]
    degree = data.draw(st.sampled_from(divisors(length)))
    plan = plan_context(mask, degree, order)
    owned = torch.cat([plan.queries(rank) for rank in range(degree)], dim=1)
    assert torch.equal(owned.sort(dim=1).values, torch.arange(length).expand_as(owned))
    pairs, received = assert_sound(plan, "attention", dense)
    assert torch.equal(plan.work(), pairs)
    assert torch.equal(plan.received_keys(), received)
