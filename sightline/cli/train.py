"""`sightline train RECIPE`: every field of a Run is an option, with the recipe's value as its default."""

from __future__ import annotations

from typing import Any

import tyro

from sightline.config import Run
from sightline.recipes import RECIPES, get_recipe
from sightline.training import train
from sightline.training.terminal import count

EXAMPLES = """examples:
  sightline train llama3-tiny
  sightline train llama3-tiny --output-dir runs/mine --data.source ~/texts --training.steps 500
  sightline train llama3-tiny --training.sequence-length 4096 --training.global-batch-size 1 \\
      --training.micro-batch-size 1
  sightline train llama3-debug --model.layers 4 --optimizer.schedule wsd"""


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    train(parse(argv))


def parse(argv: list[str]) -> Run:
    """The Run of a recipe's name and options. tyro ends the process by itself on --help and on a wrong option."""
    if argv[0].startswith("-"):
        raise ValueError(f"the recipe comes before the options, got {argv[0]!r} first; recipes: {', '.join(RECIPES)}")
    recipe = get_recipe(argv[0])
    kind: Any = Run[type(recipe.model)]  # type: ignore[misc]  # so that the model's own fields are options too
    return tyro.cli(
        kind,
        default=recipe,
        args=argv[1:],
        prog=f"sightline train {argv[0]}",
        description=f"Train {argv[0]}. The defaults are the recipe's.\n\n{EXAMPLES}",
        config=(tyro.conf.AvoidSubcommands,),
    )


def usage() -> str:
    lines = ["usage: sightline train RECIPE [options]", "", "recipes:"]
    for name, run in RECIPES.items():
        training, model = run.training, run.model
        lines.append(
            f"  {name:<14} {model.layers} layers of width {model.width:,}; {training.steps:,} steps of "
            f"{count(training.global_batch_size * training.sequence_length)} tokens"
        )
    return "\n".join([*lines, "", "options: sightline train RECIPE --help", "", EXAMPLES])
