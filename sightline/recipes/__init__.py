"""Recipes: a whole `Run` for each model, ready to train. Every field of it is an option of `sightline train`."""

from __future__ import annotations

from sightline.config import Run
from sightline.recipes.llama3 import LLAMA3_RECIPES

__all__ = ["RECIPES", "get_recipe"]

RECIPES: dict[str, Run] = {**LLAMA3_RECIPES}


def get_recipe(name: str) -> Run:
    """The recipe of a name: `llama3-tiny`, `llama3-8b`, ..."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; the recipes are: {', '.join(RECIPES)}")
    return RECIPES[name]
