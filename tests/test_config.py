import dataclasses

import pytest

from sightline import config
from sightline.config import CheckpointConfig, DataConfig, OptimizerConfig, TrainingConfig, ValidationConfig


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: TrainingConfig(sequence_length=1), "sequence-length must be at least 2"),
        (lambda: TrainingConfig(steps=0), "training.steps must be greater than 0, got 0"),
        (lambda: DataConfig(validation_fraction=1.0), "validation-fraction"),
        (lambda: OptimizerConfig(betas=(0.9, 1.0)), r"optimizer.betas must be in \[0, 1\)"),
        (lambda: OptimizerConfig(min_lr_ratio=1.5), "min-lr-ratio must be between 0 and 1, got 1.5"),
        (lambda: OptimizerConfig(warmup_steps=-1), "warmup-steps"),
        (lambda: OptimizerConfig(weight_decay=-0.1), "weight-decay"),
        (lambda: OptimizerConfig(momentum=1.0), r"optimizer.momentum must be in \[0, 1\), got 1.0"),
        (lambda: OptimizerConfig(name="lion"), "optimizer.name must be one of adamw, muon, got 'lion'"),
        (lambda: ValidationConfig(rows=0), "validation.rows"),
        (lambda: CheckpointConfig(keep=0), "checkpoint.keep must be greater than 0"),
        (lambda: CheckpointConfig(every=-1), "checkpoint.every"),
    ],
)
def test_invalid_values_raise_with_value_and_remedy(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_every_config_is_frozen_and_keyword_only() -> None:
    for item in vars(config).values():
        if dataclasses.is_dataclass(item):
            parameters = item.__dataclass_params__
            assert parameters.frozen and all(field.kw_only for field in dataclasses.fields(item)), item
