"""`sightline convert SOURCE OUTPUT`: a trained model as a Hugging Face directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from sightline.models import load_pretrained, save_pretrained
from sightline.models.weights import holds_weights
from sightline.training import RunFailed
from sightline.training.trained import load_trained


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
    max_shard_bytes: int = 5_000_000_000
    """Size of one file of weights."""


def main(argv: list[str]) -> None:
    options = tyro.cli(Convert, args=argv, prog="sightline convert")
    model, source, fields = _read(options.source)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    try:
        save_pretrained(
            model,
            options.output,
            dtype=dtype,
            source=source,
            config_fields=fields,
            max_shard_bytes=options.max_shard_bytes,
        )
    except OSError as error:
        raise RunFailed(str(error)) from error
    print(f"wrote {type(model).__name__} of {source} to {options.output}")


def _read(path: Path) -> tuple[Any, Path, dict[str, Any]]:
    """The model, the directory whose tokenizer goes with it, and what else its config.json should say."""
    if holds_weights(path):
        return load_pretrained(path), path, {}
    trained = load_trained(path, torch.device("cpu"))
    run, tokenizer = trained.run, trained.tokenizer
    fields = {
        "max_position_embeddings": run.training.sequence_length,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    # The checkpoint keeps of a tokenizer what training needs; the files it came from say more (a chat template, ...).
    begun_from = run.model_from
    if begun_from is not None and run.data.tokenizer is None and begun_from.is_dir():
        return trained.model, begun_from, fields
    return trained.model, trained.checkpoint, fields
