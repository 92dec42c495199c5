"""Decay groups and the schedules, with literals."""

import dataclasses

import pytest
import torch

from sightline.config import Optimizer
from sightline.models import build_model
from sightline.training.optimizer import build_optimizer, learning_rate, optimizer_state
from tests.support.small_runs import MODEL


def rates(schedule: str, steps: int, **changes: float) -> list[float]:
    options = Optimizer(learning_rate=1.0, warmup_steps=4, schedule=schedule, final_share=0.1, **changes)  # type: ignore[arg-type]
    return [learning_rate(step, options, steps) for step in range(1, steps + 1)]


def test_cosine() -> None:
    assert rates("cosine", 8) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.868198, 0.55, 0.231802, 0.1], abs=1e-6)


def test_linear() -> None:
    assert rates("linear", 8) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.775, 0.55, 0.325, 0.1])


def test_warmup_stable_decay() -> None:
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 0.55, 0.1]
    assert rates("wsd", 10, decay_share=0.2) == pytest.approx(expected)
    assert rates("wsd", 6, decay_share=0.0) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates("wsd", 6, decay_share=1.0) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.55, 0.1])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_run_shorter_than_its_warmup_never_leaves_it(schedule) -> None:
    assert rates(schedule, 2) == [0.25, 0.5]
    assert rates(schedule, 4) == [0.25, 0.5, 0.75, 1.0]


def test_no_warmup_begins_beside_the_peak() -> None:
    options = Optimizer(learning_rate=2.0, warmup_steps=0, schedule="linear", final_share=0.0)
    assert [learning_rate(step, options, 4) for step in (1, 2, 3, 4)] == [1.5, 1.0, 0.5, 0.0]


def test_matrices_decay_and_vectors_do_not() -> None:
    model = build_model(MODEL)
    matrices, vectors = build_optimizer(model, Optimizer(weight_decay=0.3)).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    assert matrices["fused"] and vectors["fused"]
    grouped = [id(p) for group in (matrices, vectors) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_a_tied_weight_is_in_one_group_once() -> None:
    model = build_model(dataclasses.replace(MODEL, tied_embeddings=True))
    optimizer = build_optimizer(model, Optimizer())
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
        p.numel() for p in model.parameters()
    )


def test_moments_that_exist_from_the_start_are_those_torch_would_make() -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(3, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    options = Optimizer(learning_rate=0.1)
    mine = build_optimizer(ours, options)
    plain = torch.optim.AdamW(
        [{"params": [theirs.weight]}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=0.1, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay, fused=True,
    )  # fmt: skip
    for _ in range(3):
        for model, optimizer in ((ours, mine), (theirs, plain)):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
    assert set(optimizer_state(ours, mine)["weight"]) == set(plain.state[theirs.weight])
