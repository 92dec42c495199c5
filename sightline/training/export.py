"""Export a checkpoint to a Hugging Face directory, file by file, without loading the full model into memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sightline.data import load_tokenizer
from sightline.models import Family, build_skeleton
from sightline.models.hf.directory import MAX_SHARD_BYTES, PretrainedWriter
from sightline.models.hf.source import read_copied_fields
from sightline.parallel.host import HostGroup
from sightline.training.checkpoint import (
    CONFIG,
    TOKENIZER,
    CannotSave,
    check_checkpoint,
    on_all_ranks,
    read_tensors,
)
from sightline.training.run_directory import PRETRAINED_CONFIG, find_checkpoint, load_config


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    host: HostGroup | None = None,
    family: Family | None = None,
    verify: bool = True,
) -> Path:
    """Write a checkpoint, or the newest one of a run, to `output` in the format of `save_pretrained`.

    host    ranks that share the work, each of which calls this function and writes some of the files; None for one
            process
    family  as in `load_config`
    verify  verify the checksums of the checkpoint, which reads its files once more

    Returns the checkpoint.

    Raises:
        ValueError: if the checkpoint is incomplete, or `output` already has weights.
        CannotSave: on every rank, if one of them cannot write.
    """
    host = host or HostGroup(alone=True)
    checkpoint = find_checkpoint(checkpoint)
    check_checkpoint(checkpoint, contents=verify, host=host)
    run = load_config(checkpoint / CONFIG, family)
    model = build_skeleton(run.model)
    state = model.state_dict()

    def read(names: list[str]) -> Mapping[str, Tensor]:
        tensors = {name: torch.empty_like(state[name], device="cpu") for name in names}
        read_tensors(checkpoint, {"model": tensors})
        return tensors

    writer = PretrainedWriter(model, output, dtype=dtype, max_shard_bytes=max_shard_bytes)
    try:
        with on_all_ranks(host):
            if host.rank == 0:
                # Never from run.model_from: the config of a run from elsewhere could name any directory.
                writer.begin(checkpoint, _fields_of_config(checkpoint, run.training.sequence_length))
        with on_all_ranks(host):
            writer.write(read, host.rank, host.world)
        with on_all_ranks(host):
            if host.rank == 0:
                writer.finish()
    except CannotSave:
        if host.rank == 0:
            writer.abandon()
        raise
    return checkpoint


def _fields_of_config(checkpoint: Path, sequence_length: int) -> dict[str, Any]:
    """Return the fields of config.json that do not come from the model config."""
    tokenizer = load_tokenizer(checkpoint / TOKENIZER)
    return {
        "max_position_embeddings": sequence_length,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        **read_copied_fields(checkpoint, PRETRAINED_CONFIG),
    }
