"""`sightline convert SOURCE OUTPUT`: a trained model as a Hugging Face directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from sightline.errors import RunFailed
from sightline.models import load_pretrained, save_pretrained
from sightline.models.pretrained import MAX_SHARD_BYTES
from sightline.models.weights import holds_weights
from sightline.training.export import export_checkpoint
from sightline.training.run_directory import find_checkpoint


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a model as a Hugging Face directory, which transformers loads: config.json, safetensors, tokenizer.

    examples:
      sightline convert runs/llama3-tiny exported
      sightline convert ~/Qwen3-0.6B smaller --dtype bfloat16

    The way in needs no conversion: sightline train qwen3-0.6b --model-from ~/Qwen3-0.6B
    """

    source: Annotated[Path, tyro.conf.Positional]
    """Directory of a run, whose newest checkpoint is taken; a checkpoint; or a Hugging Face directory."""
    output: Annotated[Path, tyro.conf.Positional]
    """Directory to write. It must not hold weights yet."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Precision of the weights written; without it, that of the source."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """Size of one file of weights."""


def main(argv: list[str]) -> None:
    options = tyro.cli(Convert, args=argv, prog="sightline convert")
    source, output, shard = options.source, options.output, options.max_shard_bytes
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    try:
        if holds_weights(source):
            save_pretrained(load_pretrained(source), output, dtype=dtype, source=source, max_shard_bytes=shard)
        else:
            source = find_checkpoint(source)
            export_checkpoint(source, output, dtype=dtype, max_shard_bytes=shard)
    except OSError as error:
        raise RunFailed(str(error)) from error
    print(f"wrote the model of {source} to {output}")
