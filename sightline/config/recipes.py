"""Recipe templates: how a model of some size is trained, whatever its family.

debug("mine-debug", MyConfig(...))          a Run, kept in runs/mine-debug
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sightline.config.run import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    Run,
    TrainingConfig,
    ValidationConfig,
)

RecipeTemplate = Callable[[str, Any], Run]
"""Called with the name of a recipe and the config of its model."""


def template(**sections: Any) -> RecipeTemplate:
    """The template of a Run with these sections, kept in runs/NAME."""

    def build(name: str, model: Any) -> Run:
        return Run(model=model, output_dir=Path("runs") / name, **sections)

    return build


debug = template(
    training=TrainingConfig(steps=50, sequence_length=256, global_batch_size=4, micro_batch_size=4),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=5),
    validation=ValidationConfig(every=25, rows=4),
    checkpoint=CheckpointConfig(every=25),
)
"""Seconds on two CPU cores, on the source of Python's standard library: to see that everything works."""

tiny = template(
    training=TrainingConfig(steps=100, sequence_length=512, global_batch_size=1, micro_batch_size=1),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=12),
    validation=ValidationConfig(every=50, rows=8),
    checkpoint=CheckpointConfig(every=50),
)
"""About a minute on two CPU cores, in which the loss falls by a quarter: small batches take more steps from the same
tokens."""

IMAGE_SECTIONS: dict[str, Any] = {
    "data": DataConfig(source="synthetic-images"),
    "logging": LoggingConfig(sample_prompt="a large", sample_tokens=20),
}
"""The sections of a recipe that trains on drawings and their captions."""


def on_gpus(learning_rate: float, **sections: Any) -> RecipeTemplate:
    """The template of a published size, by its peak learning rate.

    The sequence length is that of the Llama 3 report (arXiv 2407.21783, table 3), the batch what one machine
    accumulates; `--data.source` and `--data.tokenizer` are yours to give.
    """
    training = TrainingConfig(
        steps=20_000, sequence_length=8192, global_batch_size=64, micro_batch_size=1, dtype="bfloat16"
    )
    return template(
        training=training,
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=1000),
        validation=ValidationConfig(every=500, rows=64),
        checkpoint=CheckpointConfig(every=500),
        **sections,
    )
