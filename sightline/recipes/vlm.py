"""How each size of the vision-language model is trained."""

from __future__ import annotations

from pathlib import Path

from sightline.config import Checkpoint, Data, Logging, Optimizer, Run, Training, Validation
from sightline.data import SYNTHETIC_IMAGES
from sightline.models import config_of


def on_drawings(name: str, *, training: Training, optimizer: Optimizer, validation: Validation, every: int) -> Run:
    """Minutes on two CPU cores, on drawings and their captions."""
    return Run(
        model=config_of(name),
        output_dir=Path("runs") / name,
        data=Data(source=SYNTHETIC_IMAGES),
        training=training,
        optimizer=optimizer,
        validation=validation,
        checkpoint=Checkpoint(every=every),
        logging=Logging(sample_prompt="a large", sample_tokens=20),
    )


VLM_RECIPES = {
    "vlm-debug": on_drawings(
        "vlm-debug",
        training=Training(steps=50, sequence_length=128, global_batch_size=4, micro_batch_size=4),
        optimizer=Optimizer(learning_rate=3e-3, warmup_steps=5),
        validation=Validation(every=25, rows=4),
        every=25,
    ),
    "vlm-tiny": on_drawings(
        "vlm-tiny",
        training=Training(steps=80, sequence_length=512, global_batch_size=2, micro_batch_size=2),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=10),
        validation=Validation(every=20, rows=8),
        every=40,
    ),
    "vlm-1.7b": Run(
        model=config_of("vlm-1.7b"),
        output_dir=Path("runs") / "vlm-1.7b",
        data=Data(source=SYNTHETIC_IMAGES),
        training=Training(
            steps=20_000, sequence_length=8192, global_batch_size=64, micro_batch_size=1, dtype="bfloat16"
        ),
        optimizer=Optimizer(learning_rate=1e-4, warmup_steps=1000),
        validation=Validation(every=500, rows=64),
        checkpoint=Checkpoint(every=500),
        logging=Logging(sample_prompt="a large", sample_tokens=20),
    ),
}
