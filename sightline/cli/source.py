"""What commands take for a trained model: a directory, or the recipe that trained it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from sightline.models import Family, family_of
from sightline.recipes import get_family, get_recipe

SourceArgument = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTORY")]


def find_source(source: str, family: str | None) -> tuple[Path, Family | None]:
    """The directory that is meant, and the family of its model where the user names one.

    source  a directory, or `package.module:NAME` for the one that this Run writes to
    family  `package.module:NAME`, a Family or a Run

    Raises:
        ValueError: for names that no module defines.
    """
    named = None if family is None else get_family(family)
    if ":" not in source or Path(source).exists():
        return Path(source), named
    run = get_recipe(source)
    return run.output_dir, named or family_of(run.model)
