"""How each size of Qwen 3 is trained."""

from __future__ import annotations

from sightline.recipes.laptop import debug, tiny
from sightline.recipes.llama3 import on_gpus

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
