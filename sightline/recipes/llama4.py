"""How each size of Llama 4 is trained."""

from __future__ import annotations

from sightline.recipes.laptop import debug, tiny
from sightline.recipes.llama3 import on_gpus

LLAMA4_RECIPES = {
    "llama4-debug": debug("llama4-debug"),
    "llama4-tiny": tiny("llama4-tiny"),
    "llama4-scout": on_gpus("llama4-scout", learning_rate=1e-4),
    "llama4-maverick": on_gpus("llama4-maverick", learning_rate=8e-5),
}
