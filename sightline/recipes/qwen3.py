"""How each size of Qwen 3 is trained."""

from __future__ import annotations

from sightline.config import Optimizer, Run, Training, Validation
from sightline.recipes.llama3 import on_gpus, on_laptop


def debug(name: str) -> Run:
    return on_laptop(
        name,
        training=Training(steps=50, sequence_length=256, global_batch_size=4, micro_batch_size=4),
        optimizer=Optimizer(learning_rate=3e-3, warmup_steps=5),
        validation=Validation(every=25, rows=4),
        every=25,
    )


def tiny(name: str) -> Run:
    return on_laptop(
        name,
        training=Training(steps=150, sequence_length=1024, global_batch_size=2, micro_batch_size=2),
        optimizer=Optimizer(learning_rate=2e-3, warmup_steps=20),
        validation=Validation(every=25, rows=8),
        every=50,
    )


QWEN3_RECIPES = {
    "qwen3-debug": debug("qwen3-debug"),
    "qwen3-debug-moe": debug("qwen3-debug-moe"),
    "qwen3-tiny": tiny("qwen3-tiny"),
    "qwen3-tiny-moe": tiny("qwen3-tiny-moe"),
    "qwen3-0.6b": on_gpus("qwen3-0.6b", learning_rate=3e-4),
    "qwen3-1.7b": on_gpus("qwen3-1.7b", learning_rate=3e-4),
    "qwen3-4b": on_gpus("qwen3-4b", learning_rate=3e-4),
    "qwen3-8b": on_gpus("qwen3-8b", learning_rate=3e-4),
    "qwen3-14b": on_gpus("qwen3-14b", learning_rate=2e-4),
    "qwen3-32b": on_gpus("qwen3-32b", learning_rate=1.5e-4),
    "qwen3-30b-a3b": on_gpus("qwen3-30b-a3b", learning_rate=2e-4),
    "qwen3-235b-a22b": on_gpus("qwen3-235b-a22b", learning_rate=1e-4),
}
