"""How each size of Llama 3 is trained."""

from __future__ import annotations

from pathlib import Path

from sightline.config import Checkpoint, Optimizer, Run, Training, Validation
from sightline.models import config_of
from sightline.recipes.laptop import debug, on_laptop


def on_gpus(name: str, learning_rate: float) -> Run:
    """The sequence length and peak learning rate of the Llama 3 report (arXiv 2407.21783, table 3), at a batch that
    one machine accumulates; `--data.source` and `--data.tokenizer` are yours to give."""
    return Run(
        model=config_of(name),
        output_dir=Path("runs") / name,
        training=Training(
            steps=20_000, sequence_length=8192, global_batch_size=64, micro_batch_size=1, dtype="bfloat16"
        ),
        optimizer=Optimizer(learning_rate=learning_rate, warmup_steps=1000),
        validation=Validation(every=500, rows=64),
        checkpoint=Checkpoint(every=500),
    )


LLAMA3_RECIPES = {
    "llama3-debug": debug("llama3-debug"),
    "llama3-tiny": on_laptop(
        "llama3-tiny",
        # A small batch takes more steps from the same tokens, which is what so short a training needs.
        training=Training(steps=395, sequence_length=1024, global_batch_size=1, micro_batch_size=1),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=30),
        validation=Validation(every=50, rows=8),
        every=100,
    ),
    "llama3-1b": on_gpus("llama3-1b", learning_rate=3e-4),
    "llama3-3b": on_gpus("llama3-3b", learning_rate=3e-4),
    "llama3-8b": on_gpus("llama3-8b", learning_rate=3e-4),
    "llama3-70b": on_gpus("llama3-70b", learning_rate=1.5e-4),
    "llama3-405b": on_gpus("llama3-405b", learning_rate=8e-5),
}
