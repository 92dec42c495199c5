import dataclasses

import pytest

from sightline import config
from sightline.config import Checkpoint, Data, Optimizer, Training, Validation


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Training(global_batch_size=6, micro_batch_size=4), r"6 is not divisible by .* 4; .*\[1, 2, 3, 6\]"),
        (lambda: Training(sequence_length=1), "sequence-length must be at least 2"),
        (lambda: Training(steps=0), "training.steps must be greater than 0, got 0"),
        (lambda: Data(validation_share=1.0), "validation-share"),
        (lambda: Optimizer(betas=(0.9, 1.0)), r"optimizer.betas must lie in \[0, 1\)"),
        (lambda: Optimizer(final_share=1.5), "final-share must lie between 0 and 1, got 1.5"),
        (lambda: Optimizer(warmup_steps=-1), "warmup-steps"),
        (lambda: Optimizer(weight_decay=-0.1), "weight-decay"),
        (lambda: Optimizer(momentum=1.0), r"optimizer.momentum must lie in \[0, 1\), got 1.0"),
        (lambda: Optimizer(name="lion"), "optimizer.name must be one of adamw, muon, got 'lion'"),
        (lambda: Validation(rows=0), "validation.rows"),
        (lambda: Checkpoint(keep=0), "checkpoint.keep must be greater than 0"),
        (lambda: Checkpoint(every=-1), "checkpoint.every"),
    ],
)
def test_refusals_name_value_and_remedy(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_every_config_is_frozen_and_by_keyword() -> None:
    for item in vars(config).values():
        if dataclasses.is_dataclass(item):
            parameters = item.__dataclass_params__
            assert parameters.frozen and all(field.kw_only for field in dataclasses.fields(item)), item
