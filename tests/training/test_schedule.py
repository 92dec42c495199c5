"""Learning rate schedules, compared with literal values."""

import pytest

from sightline.config import OptimizerConfig
from sightline.training.schedule import learning_rate


def rates(schedule: str, steps: int, **changes: float) -> list[float]:
    options = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule=schedule, min_lr_ratio=0.1, **changes)  # type: ignore[arg-type]
    return [learning_rate(step, options, steps) for step in range(1, steps + 1)]


def test_cosine() -> None:
    assert rates("cosine", 8) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.868198, 0.55, 0.231802, 0.1], abs=1e-6)


def test_linear() -> None:
    assert rates("linear", 8) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.775, 0.55, 0.325, 0.1])


def test_warmup_stable_decay() -> None:
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 0.55, 0.1]
    assert rates("wsd", 10, decay_ratio=0.2) == pytest.approx(expected)
    assert rates("wsd", 6, decay_ratio=0.0) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates("wsd", 6, decay_ratio=1.0) == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.55, 0.1])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_run_shorter_than_its_warmup_never_leaves_it(schedule) -> None:
    assert rates(schedule, 2) == [0.25, 0.5]
    assert rates(schedule, 4) == [0.25, 0.5, 0.75, 1.0]


def test_without_warmup_the_first_step_is_near_the_peak() -> None:
    options = OptimizerConfig(learning_rate=2.0, warmup_steps=0, schedule="linear", min_lr_ratio=0.0)
    assert [learning_rate(step, options, 4) for step in (1, 2, 3, 4)] == [1.5, 1.0, 0.5, 0.0]
