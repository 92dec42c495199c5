"""What a run is made of: the sections of a `Run`, and recipe templates (`sightline.config.recipes`)."""

from sightline.config.run import (
    SCHEDULES,
    Attention,
    Checkpoint,
    Data,
    Logging,
    Optimizer,
    Parallel,
    Run,
    Training,
    Validation,
)

__all__ = [
    "SCHEDULES",
    "Attention",
    "Checkpoint",
    "Data",
    "Logging",
    "Optimizer",
    "Parallel",
    "Run",
    "Training",
    "Validation",
]
