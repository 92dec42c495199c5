"""The argument of commands that names a trained model: a directory, or the Run that trained it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from sightline.models import Family, family_of
from sightline.recipes import get_family, get_recipe

SourceArgument = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTORY")]


def find_source(source: str, family: str | None) -> tuple[Path, Family | None]:
    """Return the directory of a trained model, and the family of the model if the user names it.

    source  a directory, or `package.module:NAME`, a Run, for the directory that it writes to
    family  `package.module:NAME`, a Family or a Run

    Raises:
        ValueError: if a module cannot be imported or does not define the name.
    """
    named = None if family is None else get_family(family)
    if ":" not in source or Path(source).exists():
        return Path(source), named
    run = get_recipe(source)
    return run.output_dir, named or family_of(run.model)
