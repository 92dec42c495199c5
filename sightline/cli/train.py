"""`sightline train RECIPE`: each field of a Run is an option, and the recipe gives its default."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

import sightline
from sightline.attention import CHOICES
from sightline.cli.options import parse_options
from sightline.config import Run
from sightline.config.renamed import old_names, renaming_message
from sightline.config.run import BackendName
from sightline.models import FAMILIES, family_of
from sightline.models.hf.source import read_model_config
from sightline.numbers import count
from sightline.recipes import RECIPES, get_recipe

EXAMPLES = """examples:
  sightline train llama3-tiny
  sightline train llama3-tiny --output-dir runs/mine --data.source ~/texts --training.steps 500
  sightline train llama3-tiny --training.sequence-length 4096 --training.global-batch-size 1 \\
      --training.micro-batch-size 1
  sightline train llama3-debug --model.num-layers 4 --optimizer.schedule wsd
  sightline train qwen3-0.6b --model-from ~/Qwen3-0.6B --data.source ~/texts
  sightline train package.module:RUN        a recipe of your own, for any model: docs/adding_a_model.md"""

CONSTRUCTORS = ConstructorRegistry()


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return
    run = parse(argv)
    sightline.train(run)  # imports the trainer only now, so that a wrong option fails fast


@CONSTRUCTORS.primitive_rule
def backend_names(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[str] | None:
    """Give `--attention.backend` the available backends as choices; the config module does not know them."""
    if info.type != str | BackendName:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"{{{','.join(CHOICES)}}}",
        instance_from_str=lambda values: values[0],
        is_instance=lambda value: value in CHOICES,
        str_from_instance=lambda name: [name],
        choices=CHOICES,
    )


def parse(argv: list[str]) -> Run:
    """Return the Run of a recipe's name and options. tyro exits the process on --help and on a wrong option.

    Raises:
        ValueError: if the first argument is not a recipe.
    """
    if argv[0].startswith("-"):
        raise ValueError(
            f"the recipe comes before the options; got {argv[0]!r} first; the recipes are: {', '.join(RECIPES)}"
        )
    recipe = get_recipe(argv[0])
    directory = _model_from(argv[1:])
    if directory is not None:
        families = (family_of(recipe.model), *FAMILIES)
        recipe = dataclasses.replace(recipe, model=read_model_config(directory, families), model_from=directory)
    options = use_new_options(recipe, argv[1:])
    kind: Any = Run[type(recipe.model)]  # type: ignore[misc]  # makes the fields of the model's config options too
    run = parse_options(
        kind,
        options,
        default=recipe,
        prog=f"sightline train {argv[0]}",
        description=f"Train {argv[0]}. The defaults are those of the recipe.\n\n{EXAMPLES}",
        config=(tyro.conf.AvoidSubcommands,),
        registry=CONSTRUCTORS,
    )
    _check_one_length(run, options)
    return run


def _check_one_length(run: Run, options: list[str]) -> None:
    """Check that the options do not set the length of the run twice.

    Raises:
        ValueError: if both --data.epochs and --training.steps are given.
    """
    given = {option.partition("=")[0].replace("_", "-") for option in options}
    if run.data.epochs is not None and {"--data.epochs", "--training.steps"} <= given:
        raise ValueError(
            f"--data.epochs {run.data.epochs} and --training.steps {run.training.steps} both set the length of a run; "
            "use one of them: --data.epochs to train on each document N times, --training.steps for a number of steps"
        )


def use_new_options(recipe: Run, options: list[str]) -> list[str]:
    """Return the options with renamed ones under their new names, and print a warning for each to standard error."""
    renamed = dict(_renamed_options("--", recipe))
    current = []
    for option in options:
        name, equals, value = option.partition("=")
        name = name.replace("_", "-")
        if name in renamed:
            if os.environ.get("RANK", "0") == "0":
                print(f"warning: {renaming_message(name, renamed[name])}", file=sys.stderr)
            option = renamed[name] + equals + value
        current.append(option)
    return current


def _renamed_options(prefix: str, section: Any) -> Iterator[tuple[str, str]]:
    """Yield (old option, new option) for each renamed field of a config and of its nested configs."""
    for old, new in old_names(type(section)).items():
        yield f"{prefix}{old}".replace("_", "-"), f"{prefix}{new}".replace("_", "-")
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _renamed_options(f"{prefix}{field.name}.", value)


def _model_from(options: list[str]) -> Path | None:
    """Return the value of --model-from. It is read first because it sets the defaults of the model options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model-from", "--model_from", type=Path)
    return parser.parse_known_args(options)[0].model_from


def usage() -> str:
    lines = ["usage: sightline train RECIPE [options]", "", "recipes:"]
    width = max(map(len, RECIPES))
    for name, run in RECIPES.items():
        training, model = run.training, run.model
        lines.append(
            f"  {name:<{width}} {model.num_layers} layers, hidden size {model.hidden_size:,}; {training.steps:,} steps "
            f"of {count(training.global_batch_size * training.sequence_length)} tokens"
        )
    return "\n".join([*lines, "", "options: sightline train RECIPE --help", "", EXAMPLES])
