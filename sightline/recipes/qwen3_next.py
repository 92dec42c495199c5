"""How each size of Qwen3-Next is trained."""

from __future__ import annotations

from sightline.config import Optimizer, Training, Validation
from sightline.recipes.llama3 import on_gpus, on_laptop

QWEN3_NEXT_RECIPES = {
    "qwen3_next-debug": on_laptop(
        "qwen3_next-debug",
        training=Training(steps=50, sequence_length=256, global_batch_size=4, micro_batch_size=4),
        optimizer=Optimizer(learning_rate=3e-3, warmup_steps=5),
        validation=Validation(every=25, rows=4),
        every=25,
    ),
    "qwen3_next-tiny": on_laptop(
        "qwen3_next-tiny",
        training=Training(steps=150, sequence_length=1024, global_batch_size=2, micro_batch_size=2),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=20),
        validation=Validation(every=25, rows=8),
        every=50,
    ),
    "qwen3_next-80b-a3b": on_gpus("qwen3_next-80b-a3b", learning_rate=2e-4),
}
