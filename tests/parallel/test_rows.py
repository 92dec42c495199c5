"""How the rows of a step are shared by ranks and forward passes."""

from __future__ import annotations

import pytest

from sightline.config import ParallelConfig, TrainingConfig
from sightline.parallel.checks import check_rows
from sightline.parallel.mesh import Degrees


def check(rows: int, micro_batch_size: int, ranks: int) -> None:
    training = TrainingConfig(global_batch_size=rows, micro_batch_size=micro_batch_size)
    check_rows(training, Degrees(ParallelConfig(), ranks))


@pytest.mark.parametrize(("rows", "micro_batch_size", "ranks"), [(4, 4, 2), (4, 8, 4), (12, 8, 2), (12, 3, 2)])
def test_a_rank_with_fewer_rows_than_a_micro_batch_uses_all_of_them(
    rows: int, micro_batch_size: int, ranks: int
) -> None:
    check(rows, micro_batch_size, ranks)
    training = TrainingConfig(global_batch_size=rows, micro_batch_size=micro_batch_size)
    assert training.rows_per_forward(rows // ranks) == min(micro_batch_size, rows // ranks)


@pytest.mark.parametrize(
    ("rows", "micro_batch_size", "ranks", "text"),
    [
        (12, 4, 2, r"has 6 rows per step, .*micro-batch-size 4; sizes that divide it: \[1, 2, 3, 6\]"),
        (6, 1, 4, "global-batch-size 6 is not divisible by .* = 4, .*; use 4 or 8$"),
        (1, 1, 4, "global-batch-size 1 is not divisible by .* = 4, .*; use 4$"),
    ],
)
def test_rows_that_cannot_be_shared_are_refused(rows: int, micro_batch_size: int, ranks: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check(rows, micro_batch_size, ranks)
