"""Recipe templates: training settings for models of a given size, independent of the model family.

debug("mine-debug", MyConfig(...))          -> Run with output directory runs/mine-debug
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
"""Function (recipe name, model config) -> Run."""


def template(**sections: Any) -> RecipeTemplate:
    """Return the template of a `Run` with these sections and the output directory runs/NAME."""

    def build(name: str, model: Any) -> Run:
        return Run(model=model, output_dir=Path("runs") / name, **sections)

    return build


debug = template(
    training=TrainingConfig(steps=50, sequence_length=256, global_batch_size=4, micro_batch_size=4),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=5),
    validation=ValidationConfig(every=25, rows=4),
    checkpoint=CheckpointConfig(every=25),
)
"""Smoke test: seconds on two CPU cores, on the source code of Python's standard library."""

tiny = template(
    training=TrainingConfig(steps=100, sequence_length=512, global_batch_size=1, micro_batch_size=1),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=12),
    validation=ValidationConfig(every=50, rows=8),
    checkpoint=CheckpointConfig(every=50),
)
"""About a minute on two CPU cores, in which the loss falls by a quarter. Batches are small, for more optimizer steps on
the same number of tokens."""

IMAGE_SECTIONS: dict[str, Any] = {
    "data": DataConfig(source="synthetic-images"),
    "logging": LoggingConfig(sample_prompt="a large", sample_tokens=20),
}
"""Sections of a recipe that trains on synthetic images and their captions."""


def on_gpus(learning_rate: float, **sections: Any) -> RecipeTemplate:
    """Return the template for models of a published size, trained on GPUs with this peak learning rate.

    The sequence length is that of the Llama 3 report (arXiv 2407.21783, table 3). The batch is of a size that a single
    machine can accumulate. Users set `--data.source` and `--data.tokenizer`.
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
