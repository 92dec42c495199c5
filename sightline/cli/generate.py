"""`sightline generate DIR`: text from the newest checkpoint of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sightline import config
from sightline.models.generation import stream
from sightline.training.setup import choose_device
from sightline.training.trained import load_trained


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Continue a text with a trained model, token by token.

    example: sightline generate runs/llama3-tiny --prompt "def " --temperature 0.5
    """

    directory: Annotated[Path, tyro.conf.Positional]
    """Directory of a run, whose newest checkpoint is taken, or a checkpoint."""
    prompt: str = "def "
    """The beginning of the text."""
    max_new_tokens: int = 200
    """Tokens to add at most; it ends before that where the model ends the document."""
    temperature: float = 0.8
    """Under 1 likely tokens become likelier; 0 always takes the likeliest."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities reach p."""
    seed: int = 0
    """The same seed draws the same text."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""


def main(argv: list[str]) -> None:
    options = tyro.cli(Generate, args=argv, prog="sightline generate")
    device = choose_device(config.Training(device=options.device))
    trained = load_trained(options.directory, device)
    pieces = stream(
        trained.model,
        trained.tokenizer,
        options.prompt,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    print(options.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
