"""`sightline hf -- COMMAND ...`: run another tool with attn_implementation="sightline" in all its processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

STARTUP = Path(__file__).parent / "hf_startup"
HELP = """usage: sightline hf -- COMMAND [arguments]

Run the command of another tool (TRL, accelerate, torchrun, LLaMA-Factory, a script of your own) with the attention
name "sightline" registered in every Python process that it starts and that imports models of transformers. A model
that is loaded by that name is passed to sightline.hf.enable.

examples:
  sightline hf -- trl sft --model_name_or_path DIR --dataset_name DIR --packing --attn_implementation sightline
  sightline hf -- accelerate launch --num_processes 2 train.py

Standard input and output, signals and the exit code are those of COMMAND; an unknown COMMAND ends with exit code 2.
A Python that is started with -I, -E or -S does not know the name, and transformers refuses it there."""


def main(argv: list[str]) -> None:
    """Replace this process by the command.

    Raises:
        ValueError: if there is no such command, or an option before it.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return
    words = argv[1:] if argv[0] == "--" else argv
    if argv[0] != "--" and argv[0].startswith("-"):
        raise ValueError(f"unknown option {argv[0]!r}; sightline hf takes none: sightline hf -- COMMAND ...")
    program = find_program(words)
    environment = startup_environment(dict(os.environ))
    sys.stdout.flush()
    if os.name == "posix":
        os.execve(program, words, environment)
    sys.exit(subprocess.run([program, *words[1:]], env=environment).returncode)  # exec of Windows returns at once


def find_program(words: list[str]) -> str:
    """Return the path of the program `words[0]`: on PATH, else beside the Python that runs this.

    Raises:
        ValueError: if there is none.
    """
    if not words:
        raise ValueError("sightline hf -- needs a command, such as: sightline hf -- trl sft --help")
    beside = str(Path(sys.executable).parent)
    program = shutil.which(words[0]) or shutil.which(words[0], path=beside)
    if program is None:
        raise ValueError(
            f"command {words[0]!r} is neither on PATH nor in {beside}; install the tool into the environment of "
            "Sightline, or give the path of its program"
        )
    return program


def startup_environment(environment: dict[str, str]) -> dict[str, str]:
    """Return the environment with `STARTUP` first on PYTHONPATH."""
    paths = [str(STARTUP), *filter(None, [environment.get("PYTHONPATH")])]
    return environment | {"PYTHONPATH": os.pathsep.join(paths)}
