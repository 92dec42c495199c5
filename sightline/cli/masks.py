"""`sightline masks`: plot and count what each token may attend to, for a recipe, a run or a mask expression."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sightline.cli.expression import HELPERS, RULES
from sightline.cli.options import parse_options

DESCRIPTION = """Plot what each token may attend to.

WHAT is a recipe, package.module:RUN (a recipe of your own) or a run directory, to plot the masks of its model on the
first batch of its data; or an expression of mask rules.

examples:
  sightline masks llama3-tiny --stats
  sightline masks runs/llama3-tiny --html masks.html
  sightline masks "causal(1, 64) & sliding_window(1, 64, 8)"
  sightline masks "causal(1, 16) & document(documents(5, 9, padding=2))" --png masks.png
  sightline masks "neighborhood(1, (8, 8), 3)"
  sightline masks "(prefix_lm(positions(9, 7), repeat([4, 2], [9, 7])) | causal(1, 16)) & document(documents(9, 7))"

"""
DESCRIPTION += f"""rules: {", ".join(RULES)}

helpers for their arguments: {", ".join(HELPERS)}; or write lists of numbers"""


@dataclass(frozen=True, kw_only=True)
class Masks:
    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WHAT")]
    """Recipe, run directory, or mask expression."""
    png: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Write the masks as a PNG image."""
    html: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Write an interactive HTML page: hover over a query, zoom in to single tokens."""
    row: int = 0
    """Row of the batch to plot; `--stats` counts all rows."""
    block_size: int = 128
    """Side, in tokens, of the square blocks counted as full, partial or empty."""
    width: Annotated[int | None, tyro.conf.arg(metavar="COLUMNS")] = None
    """Columns of the plot in the terminal; None uses the width of the terminal, at most 100."""
    stats: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print visible pairs, block counts and, for a recipe or run, the FLOPs of a training step."""
    sequence_length: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
    """Tokens of a row; None uses the sequence length of the recipe or run."""
    family: str | None = None
    """The family of the run's model, if it is your own: package.module:NAME, a Family or a Run."""

    def __post_init__(self) -> None:
        for name, least in (("row", 0), ("block_size", 1), ("width", 24), ("sequence_length", 2)):
            if (number := getattr(self, name)) is not None and number < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {number}")


def main(argv: list[str]) -> None:
    options = parse_options(Masks, argv, prog="sightline masks", description=DESCRIPTION)
    importlib.import_module("sightline.cli.show_masks").show_masks(options)
