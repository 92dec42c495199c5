"""Recipes: a whole `Run` for each model, ready to train. Every field of it is an option of `sightline train`."""

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
    """The recipe of a name: `llama3-tiny`, `llama3-8b`, ..., or `package.module:NAME`, a Run of somebody's own.

    Raises:
        ValueError: for a name that is no recipe, and a module that cannot be imported or does not define it.
    """
    if ":" in name:
        return import_value(name, Run)
    if name not in RECIPES:
        raise ValueError(
            f"unknown recipe {name!r}; the recipes are: {', '.join(RECIPES)}; or package.module:NAME, a Run of your own"
        )
    return RECIPES[name]


def get_family(reference: str) -> Family:
    """The family that `package.module:NAME` is, or that the model of such a Run is of. Raises as `get_recipe`."""
    value = import_value(reference, Family, Run)
    return family_of(value.model) if isinstance(value, Run) else value


def import_value(reference: str, *kinds: type) -> Any:
    """The value NAME of a module, by `package.module:NAME`; modules are looked for in the current directory first.

    Raises:
        ValueError: where there is no such module, or nothing of these kinds by that name in it.
    """
    expected = " or ".join(kind.__name__ for kind in kinds)
    module_name, _, name = reference.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*:\w+", reference):
        raise ValueError(
            f"{reference!r} is not of the form package.module:NAME; expected the name of a module as `import` takes "
            f"it, and the name of a {expected} in it"
        )
    here = os.getcwd()
    if sys.path[:1] != [here]:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"cannot import {module_name} of {reference!r}: {error}; expected a module in {here} or among what is "
            "installed"
        ) from error
    value = getattr(module, name, None)
    if not isinstance(value, kinds):
        found = [known for known, candidate in vars(module).items() if isinstance(candidate, kinds)]
        raise ValueError(
            f"{reference!r} is {f'a {type(value).__name__}' if hasattr(module, name) else 'not there'}, expected a "
            f"{expected}; in {module_name} there is {', '.join(found) or f'no {expected}'}"
        )
    return value
