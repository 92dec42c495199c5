"""The configuration of a run: the sections of a `Run`, and recipe templates (`sightline.config.recipes`)."""

import warnings

from sightline.config import run
from sightline.config.renamed import renaming_message
from sightline.config.run import (
    OPTIMIZER_STATE,
    SCHEDULES,
    AttentionConfig,
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    Run,
    TrainingConfig,
    ValidationConfig,
)

__all__ = [
    "OPTIMIZER_STATE",
    "SCHEDULES",
    "AttentionConfig",
    "CheckpointConfig",
    "DataConfig",
    "LoggingConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Run",
    "TrainingConfig",
    "ValidationConfig",
]


def __getattr__(name: str) -> object:
    """The sections' old names, `Training` for `TrainingConfig`: accepted until version 0.4 with a warning."""
    if f"{name}Config" not in __all__:
        raise AttributeError(f"module 'sightline.config' has no attribute {name!r}")
    warnings.warn(renaming_message(f"sightline.config.{name}", f"{name}Config"), FutureWarning, stacklevel=2)
    return getattr(run, f"{name}Config")
