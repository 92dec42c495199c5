"""Every command in the README, docs, scripts and help texts is accepted, and its run can be trained on its ranks."""

from __future__ import annotations

import importlib.util
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
import tyro
from torch.distributed.run import get_args_parser

from sightline.cli import convert, generate, leaks, masks, plan, train
from sightline.cli.expression import evaluate
from sightline.config import Run
from sightline.parallel.checks import check_run
from sightline.parallel.mesh import AXES

ROOT = Path(__file__).parent.parent
FILES = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("scripts/**/*.*"), *ROOT.glob("sightline/cli/*.py")]
LINE = re.compile(r"^[ #$]*((?:sightline|torchrun .*-m sightline|sbatch|make|python -m) .*)$", re.MULTILINE)
PROSE = re.compile(r"`((?:sightline [^` ]+|torchrun [^`]*-m sightline|make|python -m) [^`\n]+)`")
SYNOPSIS = re.compile(r"\.\.\.|\[|\$|\.$|\b(RECIPE|DIR|PATH|OUT|OUTPUT|COMMAND|N)\b|package\.module")
"""A placeholder, an optional part or the end of a sentence: no command to run as it is."""
GPUS_OF_A_NODE = 8
TOOLS = ("trl", "accelerate", "torchrun", "axolotl", "llamafactory-cli")
"""Programs that the documentation runs by `sightline hf`."""


def commands() -> list[tuple[str, str]]:
    """Return the file and the text of each command."""
    found = []
    for file in FILES:
        text = re.sub(r"\\+\n\s*", "", file.read_text())
        for line in LINE.findall(text) + (PROSE.findall(text) if file.suffix == ".md" else []):
            command = re.split(r"\s{3,}|\s#|\"\"\"", line)[0].strip()  # the description follows
            if not SYNOPSIS.search(command):
                found.append((file.name, command))
    return list(dict.fromkeys(found))


def check_trainable(run: Run, world: int) -> None:
    """Check that `sightline train` takes the run on `world` processes with GPUs, without building its model."""
    check_run(run, world, torch.device("cpu" if run.training.device == "cpu" else "cuda"))


def check_sightline(words: list[str], world: int = 1) -> None:
    """Check the arguments of `sightline` as the command does, before it reads any file."""
    command, *rest = words
    if "--model-from" in rest:  # needs the directory
        at = rest.index("--model-from")
        del rest[at : at + 2]
    match command:
        case "train":
            check_trainable(train.parse(rest), world)
        case "plan":
            options, rest = plan._parse_options(rest)
            run = train.parse(rest)
            degrees = math.prod(abs(getattr(run.parallel, axis)) for axis in AXES)
            check_trainable(run, options.processes or degrees)
        case "masks":
            options = tyro.cli(masks.Masks, args=rest)
            if "(" in options.what:
                evaluate(options.what)
        case "generate":
            tyro.cli(generate.Generate, args=rest)
        case "leaks":
            tyro.cli(leaks.Leaks, args=rest)
        case "convert":
            tyro.cli(convert.Convert, args=rest)
        case "hf":
            assert rest[0] == "--" and rest[1] in TOOLS
        case _:
            raise ValueError(f"no command {command}")


def check_command(command: str) -> None:
    program, *words = shlex.split(command)
    match program:
        case "make":
            assert f"\n{words[0]}:" in "\n" + (ROOT / "Makefile").read_text()
        case "python":
            assert importlib.util.find_spec(words[1]) is not None
        case "torchrun":
            options = get_args_parser().parse_args(words)
            assert options.module and options.training_script == "sightline"
            nodes = int(options.nnodes.split(":")[-1])
            check_sightline(options.training_script_args, nodes * int(options.nproc_per_node))
        case "sbatch":
            script = words.index("scripts/slurm.sbatch")
            nodes = int(words[words.index("--nodes") + 1])
            check_sightline(["train", *words[script + 1 :]], nodes * GPUS_OF_A_NODE)
        case _:
            check_sightline(words)


COMMANDS = commands()


@pytest.mark.parametrize(("file", "command"), COMMANDS, ids=[": ".join(pair) for pair in COMMANDS])
def test_documented_command_is_accepted(file: str, command: str) -> None:
    try:
        check_command(command)
    except SystemExit as end:
        assert end.code == 0, f"{command} is refused"  # --help ends with 0


def test_commands_of_every_kind_are_found() -> None:
    programs = {tuple(command.split()[:2]) for _, command in COMMANDS}
    assert {("sightline", name) for name in ("train", "plan", "masks", "generate", "convert")} <= programs
    assert {program for program, _ in programs} == {"sightline", "torchrun", "sbatch", "make", "python"}
