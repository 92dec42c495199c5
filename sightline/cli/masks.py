"""`sightline masks`: draw and count what each token may see, for a recipe, a run or an expression of rules."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sightline.cli.expression import HELPERS, RULES

DESCRIPTION = """Draw what each token may see.

WHAT is a recipe (of your own: package.module:RUN) or the directory of a run (the masks of its model on the first batch
of its data), or an expression of rules over one row.

examples:
  sightline masks llama3-tiny --stats
  sightline masks runs/llama3-tiny --html masks.html
  sightline masks "causal(1, 64) & sliding_window(1, 64, 8)"
  sightline masks "causal(1, 16) & document(documents(5, 9, padding=2))" --png masks.png
  sightline masks "(prefix_lm(positions(9, 7), repeat([4, 2], [9, 7])) | causal(1, 16)) & document(documents(9, 7))"

"""
DESCRIPTION += f"""rules: {", ".join(RULES)}

facts about tokens: {", ".join(HELPERS)}, or lists of numbers"""


@dataclass(frozen=True, kw_only=True)
class Masks:
    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="WHAT")]
    """Recipe, directory of a run, or expression of rules."""
    png: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Write the masks as a picture."""
    html: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Write them as one page to explore in a browser: hover over a query, zoom down to single tokens."""
    row: int = 0
    """Row of the batch that is drawn; `--stats` counts all of them."""
    block_size: int = 128
    """Tokens a side of the blocks that are counted as full, partial or empty."""
    width: Annotated[int | None, tyro.conf.arg(metavar="COLUMNS")] = None
    """Columns of the picture in the terminal; without it, the terminal's, at most 100."""
    stats: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Count: visible pairs, blocks, and for a recipe or a run the FLOPs of a training step."""
    sequence_length: Annotated[int | None, tyro.conf.arg(metavar="TOKENS")] = None
    """Tokens of a row, in place of those of the recipe or the run."""
    family: str | None = None
    """The family of a run's model where it is one of your own: package.module:NAME, a Family or a Run."""


def main(argv: list[str]) -> None:
    options = tyro.cli(Masks, args=argv, prog="sightline masks", description=DESCRIPTION)
    importlib.import_module("sightline.cli.show_masks").show_masks(options)
