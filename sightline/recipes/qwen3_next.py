"""How each size of Qwen3-Next is trained."""

from __future__ import annotations

from sightline.recipes.laptop import debug, tiny
from sightline.recipes.llama3 import on_gpus

QWEN3_NEXT_RECIPES = {
    "qwen3_next-debug": debug("qwen3_next-debug"),
    "qwen3_next-tiny": tiny("qwen3_next-tiny"),
    "qwen3_next-80b-a3b": on_gpus("qwen3_next-80b-a3b", learning_rate=2e-4),
}
