"""Recipes: a whole `Run` for each model, ready to train. Every field of it is an option of `sightline train`."""

from __future__ import annotations

from sightline.config import Run
from sightline.recipes.deepseek_v3 import DEEPSEEK_V3_RECIPES
from sightline.recipes.gpt_oss import GPT_OSS_RECIPES
from sightline.recipes.llama3 import LLAMA3_RECIPES
from sightline.recipes.llama4 import LLAMA4_RECIPES
from sightline.recipes.qwen3 import QWEN3_RECIPES
from sightline.recipes.qwen3_next import QWEN3_NEXT_RECIPES
from sightline.recipes.vlm import VLM_RECIPES

__all__ = ["RECIPES", "get_recipe"]

RECIPES: dict[str, Run] = {
    **LLAMA3_RECIPES,
    **LLAMA4_RECIPES,
    **QWEN3_RECIPES,
    **DEEPSEEK_V3_RECIPES,
    **GPT_OSS_RECIPES,
    **QWEN3_NEXT_RECIPES,
    **VLM_RECIPES,
}


def get_recipe(name: str) -> Run:
    """The recipe of a name: `llama3-tiny`, `llama3-8b`, ..."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; the recipes are: {', '.join(RECIPES)}")
    return RECIPES[name]
