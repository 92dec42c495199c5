"""`sightline convert SOURCE OUTPUT`: write a trained model as a Hugging Face directory."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from sightline.cli.options import parse_options
from sightline.cli.source import SourceArgument, find_source
from sightline.models import FAMILIES, load_pretrained, save_pretrained
from sightline.models.hf.directory import MAX_SHARD_BYTES
from sightline.models.hf.source import find_pretrained, is_pretrained
from sightline.models.hf.vision_pair import load_vision_pair
from sightline.training.checkpoint_directory import is_run


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Write a trained model as a Hugging Face directory that transformers loads: config.json, safetensors, tokenizer.

    examples:
      sightline convert runs/llama3-tiny exported
      sightline convert ~/Qwen3-0.6B smaller --dtype bfloat16
      sightline convert ~/Llama-3.2-1B vlm --vision ~/siglip2-so400m-patch16-naflex
      sightline convert package.module:RUN exported

    Training from a Hugging Face directory needs no conversion: sightline train qwen3-0.6b --model-from ~/Qwen3-0.6B
    """

    source: SourceArgument
    """A run directory, for its newest checkpoint; a checkpoint; a Hugging Face directory, or the name of a Hub model.
    Or package.module:NAME, a Run of your own, for its output directory."""
    output: Annotated[Path, tyro.conf.Positional]
    """Directory to write. It must not contain weights yet."""
    family: str | None = None
    """The family of the directory's model, if it is your own: package.module:NAME, a Family or a Run."""
    vision: Path | None = None
    """Hugging Face directory of a SigLIP 2 model: write a VLM of this image encoder and the Llama 3 of DIRECTORY.
    The projector between them is newly initialized; train it: sightline train vlm-1.7b --model-from OUTPUT."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the written weights; None keeps the dtype of the source."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """Largest size of one weight file, in bytes."""
    verify: bool = True
    """Verify the checksums of a checkpoint, which reads its files once more."""

    def __post_init__(self) -> None:
        if self.max_shard_bytes < 1:
            raise ValueError(f"--max-shard-bytes must be at least 1, got {self.max_shard_bytes}")


def main(argv: list[str]) -> None:
    options = parse_options(Convert, argv, prog="sightline convert")
    source, family = find_source(options.source, options.family)
    output, shard = options.output, options.max_shard_bytes
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; choose another OUTPUT, a directory to write the model to")
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    pretrained = bool(options.vision)
    if not is_run(source):
        source = find_pretrained(source, FAMILIES if family is None else (family,))
        pretrained = pretrained or is_pretrained(source)
    if pretrained:
        model = load_vision_pair(options.vision, source) if options.vision else load_pretrained(source, family=family)
        save_pretrained(model, output, dtype=dtype, source=source, max_shard_bytes=shard)
    else:
        export = importlib.import_module("sightline.training.export")  # imported here so that --help is fast
        writing = {"dtype": dtype, "max_shard_bytes": shard, "family": family}
        source = export.export_checkpoint(source, output, **writing, verify=options.verify)
    print(f"wrote the model of {source} to {output}")
