"""Entry point of `sightline`: run the chosen command, and turn errors into one message and an exit code."""

from __future__ import annotations

import importlib
import io
import os
import sys
from typing import NamedTuple, NoReturn

from rich.console import Console
from rich.text import Text

from sightline import __version__
from sightline.errors import AnotherRankEnded, LostRank, RunEnded, Stopped, exit_code_of
from sightline.paths import printable


class Command(NamedTuple):
    module: str
    """Module whose `main` takes the arguments. It is imported only when the command is chosen, so that help is fast."""
    line: str


COMMANDS = {
    "train": Command("sightline.cli.train", "train a model from a recipe, or resume its run"),
    "generate": Command("sightline.cli.generate", "continue a prompt with a trained model"),
    "convert": Command("sightline.cli.convert", "write a trained model as a Hugging Face directory"),
    "masks": Command("sightline.cli.masks", "plot and count what each token may attend to"),
    "leaks": Command("sightline.cli.leaks", "test whether documents of a packed row depend on each other in a model"),
    "plan": Command("sightline.cli.plan", "estimate memory, communication and pipeline bubble of a run on a mesh"),
    "hf": Command("sightline.cli.hf", "run TRL or another Hugging Face tool with the attention of Sightline"),
}

EXAMPLES = """examples:
  sightline train llama3-tiny
  sightline generate runs/llama3-tiny --prompt "def "
  sightline masks llama3-tiny"""


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 success, 1 failure, 2 wrong input, 128 + n stopped by signal n."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        sys.exit(run(argv))
    except BrokenPipeError:  # `sightline generate ... | head` closed the pipe: no error message
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def run(argv: list[str]) -> int:
    """Run one command and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks ends no command
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"sightline {__version__}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise ValueError(f"unknown command {argv[0]!r}; the commands are: {', '.join(COMMANDS)}")
        importlib.import_module(COMMANDS[argv[0]].module).main(argv[1:])
    except AnotherRankEnded as ended:
        return ended.exit_code
    except Stopped as stopped:
        print_error(stopped, str(stopped), style="yellow")
        return stopped.exit_code
    except (RunEnded, LostRank, ValueError) as error:
        print_error(error, f"error: {error}")
        return exit_code_of(error)
    except BrokenPipeError:
        raise
    except OSError as error:  # a file that cannot be read or written, and that no command expects
        print_error(error, f"error: {error.filename or argv[0]}: {error.strerror or error}")
        return 1
    except KeyboardInterrupt as interrupt:
        print_error(interrupt, "interrupted; existing checkpoints are unchanged", style="yellow")
        return 130
    return 0


def print_error(error: BaseException, message: str, style: str = "red") -> None:
    """Print why the process ends to standard error, with its rank if that is not 0.

    Only the first rank of a machine prints an error that all its ranks have in common, such as a wrong option. An error
    with a note comes from `distributed_session` and belongs to one rank, which prints it itself.
    """
    prints = getattr(error, "__notes__", None) or os.environ.get("LOCAL_RANK", "0") == "0"
    rank = os.environ.get("RANK", "0")
    if prints:
        console = Console(stderr=True, highlight=False)
        prefix = "" if rank == "0" else f"[rank {rank}] "
        console.print(Text(printable(prefix + message)), style=style, soft_wrap=not console.is_terminal)


def usage() -> str:
    commands = "\n".join(f"  {name:<10} {command.line}" for name, command in COMMANDS.items())
    return (
        "Sightline trains language models on packed documents: what each token may see is data.\n\n"
        "usage: sightline COMMAND [options]\n\n"
        f"commands:\n{commands}\n\n"
        f"help: sightline COMMAND --help; sightline train RECIPE --help lists every option\n\n{EXAMPLES}"
    )
