"""The recipes of the two small sizes that every family has: a second's debug, and a minute's tiny."""

from __future__ import annotations

from pathlib import Path

from sightline.config import Checkpoint, Optimizer, Run, Training, Validation
from sightline.models import config_of


def on_laptop(name: str, *, training: Training, optimizer: Optimizer, validation: Validation, every: int) -> Run:
    """Minutes on two CPU cores, on the source of Python's standard library."""
    return Run(
        model=config_of(name),
        output_dir=Path("runs") / name,
        training=training,
        optimizer=optimizer,
        validation=validation,
        checkpoint=Checkpoint(every=every),
    )


def debug(name: str) -> Run:
    """Seconds on two CPU cores: to see that everything works."""
    return on_laptop(
        name,
        training=Training(steps=50, sequence_length=256, global_batch_size=4, micro_batch_size=4),
        optimizer=Optimizer(learning_rate=3e-3, warmup_steps=5),
        validation=Validation(every=25, rows=4),
        every=25,
    )


def tiny(name: str) -> Run:
    """About a minute on two CPU cores, in which the loss falls by a quarter: small batches take more steps from the
    same tokens."""
    return on_laptop(
        name,
        training=Training(steps=100, sequence_length=512, global_batch_size=1, micro_batch_size=1),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=12),
        validation=Validation(every=50, rows=8),
        every=50,
    )
