"""Recipes: a complete `Run` for each model, ready to train. Every field is an option of `sightline train`."""

from __future__ import annotations

import importlib
import os
import re
import sys
from typing import Any

from sightline.config import Run
from sightline.models import FAMILIES, Family, family_of

__all__ = ["RECIPES", "get_family", "get_recipe"]

RECIPES: dict[str, Run] = {
    f"{family.name}-{size}": template(f"{family.name}-{size}", family.presets[size])
    for family in FAMILIES
    for size, template in family.recipes.items()
}


def get_recipe(name: str) -> Run:
    """Return a recipe by name: `llama3-tiny`, `llama3-8b`, ..., or `package.module:NAME` for a Run of your own.

    Raises:
        ValueError: if there is no recipe of that name, or the module cannot be imported or does not define it.
    """
    if ":" in name:
        return import_value(name, Run)
    if name not in RECIPES:
        raise ValueError(
            f"unknown recipe {name!r}; the recipes are: {', '.join(RECIPES)}; or package.module:NAME, a Run of your own"
        )
    return RECIPES[name]


def get_family(reference: str) -> Family:
    """Return the Family at `package.module:NAME`, or the family of the model if NAME is a Run.

    Raises:
        ValueError: if the module cannot be imported or does not define it.
    """
    value = import_value(reference, Family, Run)
    return family_of(value.model) if isinstance(value, Run) else value


def import_value(reference: str, *kinds: type) -> Any:
    """Import a module and return its value NAME, by `package.module:NAME`. The current directory is searched first.

    Raises:
        ValueError: if there is no such module, or the module has no NAME of one of these classes.
    """
    expected = " or ".join(kind.__name__ for kind in kinds)
    module_name, _, name = reference.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", reference):
        raise ValueError(
            f"{reference!r} is not of the form package.module:NAME; expected the name of an importable module, and the "
            f"name of a {expected} in it"
        )
    here = os.getcwd()
    if sys.path[:1] != [here]:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"cannot import {module_name} of {reference!r}: {error}; expected a module in {here} or an installed one"
        ) from error
    value = getattr(module, name, None)
    if not isinstance(value, kinds):
        found = [known for known, candidate in vars(module).items() if isinstance(candidate, kinds)]
        actual = f"has type {type(value).__name__}" if hasattr(module, name) else "does not exist"
        raise ValueError(
            f"{reference!r} {actual}; expected a {expected}; {module_name} defines {', '.join(found) or 'none'}"
        )
    return value
