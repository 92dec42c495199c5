"""Load and save models as Hugging Face directories: config.json and safetensors files."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sightline.models.families import FAMILIES, build_skeleton, family_of
from sightline.models.family import Family
from sightline.models.hf.files import check_names, check_weights, holds_weights, read_weights, write_weights
from sightline.models.hf.format import HuggingFace, read_field
from sightline.models.hf.source import (
    CONFIG,
    copy_files,
    find_family,
    find_pretrained,
    read_config,
    read_copied_fields,
    read_model_config,
)
from sightline.torch_private import is_dtensor

MAX_SHARD_BYTES = 5_000_000_000
"""Default maximum size of a safetensors file."""


def load_pretrained(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    attention_backend: str = "auto",
    family: Family | None = None,
) -> Any:
    """Load a model from a Hugging Face directory, on the default device.

    directory  a directory, or the name of a model on the Hugging Face Hub, which is downloaded
    dtype      dtype of the parameters; default: the dtype in config.json, else float32
    family     model family; default: the one of FAMILIES that supports the architecture in config.json

    Peak memory is the model plus about one safetensors file. Names and shapes of all tensors are compared with the
    config before memory is allocated.

    Raises:
        ValueError: if this is not a Hugging Face directory, no family supports the model, or the weights do not match.
    """
    families = FAMILIES if family is None else (family,)
    directory = find_pretrained(directory, families)
    config = read_model_config(directory, families)
    dtype = dtype or _dtype_of(read_config(directory))
    device = torch.get_default_device()
    model = _check_names_and_build(config, directory, attention_backend)
    for parameter in model.parameters():  # buffers keep their dtype: they are small, and some need the precision
        parameter.data = parameter.data.to(dtype)
    model.check_backend(device, dtype, training=False)
    read_pretrained(model, directory, lambda: model.to_empty(device=device).state_dict())
    return model


def check_pretrained(config: Any, directory: Path) -> None:
    """Check that the weights of a Hugging Face directory are those of a model config, without memory for the model.

    Raises:
        ValueError: as `load_pretrained`.
    """
    model, hf_format = _check_names_and_build(config, directory), _format_in(directory, config)
    check_weights(model, directory, hf_format.weights(config), ignored=hf_format.ignored)


def read_pretrained(model: Any, directory: Path, state: Callable[[], Mapping[str, Tensor]] | None = None) -> None:
    """Load the weights of a Hugging Face directory into an existing model.

    state  returns {name in the model: tensor to fill}; see `read_weights`

    Raises:
        ValueError: as `load_pretrained`.
    """
    hf_format = _format_in(directory, model.config)
    read_weights(model, directory, hf_format.weights(model.config), ignored=hf_format.ignored, state=state)


def _check_names_and_build(config: Any, directory: Path, attention_backend: str = "auto") -> Any:
    """Build the model on the meta device; the names are checked before, since thousands of layers take seconds."""
    hf_format = _format_in(directory, config)
    check_names(directory, hf_format.weights(config), ignored=hf_format.ignored)
    return build_skeleton(config, attention_backend=attention_backend)


def _format_in(directory: Path, config: Any) -> HuggingFace:
    """Return the format of the config's family, after a check that the directory has a model of this family."""
    hf_format = find_family(read_config(directory), directory, (family_of(config),)).hf
    assert hf_format is not None, "find_family returns only families with a Hugging Face format"
    return hf_format


def save_pretrained(
    model: Any,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    source: str | Path | None = None,
    config_fields: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Save a model as a Hugging Face directory that transformers can load.

    dtype            dtype of the saved parameters; default: their dtype in the model
    source           directory to copy the tokenizer and generation config from
    config_fields    additional fields of config.json that the model does not have, such as eos_token_id; fields of the
                     source take precedence
    max_shard_bytes  maximum size of a safetensors file; a larger tensor gets a file of its own

    All files are written to a temporary directory first, so a full disk or a kill leaves no partial model.

    Raises:
        ValueError: if the directory already has weights, the model has no family, or its parameters are sharded.
        OSError: if writing fails.
    """
    state = model.state_dict()
    sharded = next((name for name, tensor in state.items() if is_dtensor(tensor)), None)
    if sharded:
        raise ValueError(
            f"{sharded} is a DTensor, so this process has only a shard of the model; expected full tensors. Save a "
            "checkpoint instead: sightline convert and --checkpoint.export write it without gathering the model"
        )
    writer = PretrainedWriter(model, Path(directory), dtype=dtype, max_shard_bytes=max_shard_bytes)
    try:
        writer.begin(None if source is None else Path(source), config_fields or {})
        writer.write(lambda names: state)
        writer.finish()
    except BaseException:
        writer.abandon()
        raise


class PretrainedWriter:
    """Writes a Hugging Face directory from one or several processes, each of which writes some of the files.

    Rank 0 calls `begin`, then every rank calls `write`, then rank 0 calls `finish`, or `abandon` to delete the files.
    They are written to a temporary subdirectory until `finish`.
    """

    def __init__(self, model: Any, directory: Path, *, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
        self.format = _format_of(model)
        if max_shard_bytes < 1:
            raise ValueError(f"max-shard-bytes must be at least 1, got {max_shard_bytes}")
        if holds_weights(directory):
            raise ValueError(f"{directory} already contains model weights; choose another directory, or empty it")
        self.model, self.directory, self.partial = model, directory, directory / ".partial"
        self.dtype, self.max_shard_bytes = dtype, max_shard_bytes

    def begin(self, source: Path | None, config_fields: Mapping[str, Any]) -> None:
        """Write config.json and copy the files of `source`.

        Raises:
            OSError: if writing fails.
        """
        saved_dtype = self.dtype or next(self.model.parameters()).dtype
        hf = {**self.format.config_to_hf(self.model.config), "dtype": str(saved_dtype).removeprefix("torch.")}
        hf |= config_fields
        if source is not None:
            hf |= read_copied_fields(source)
        with self._reporting_errors():
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            if source is not None:
                copy_files(source, self.partial)
            (self.partial / CONFIG).write_text(json.dumps(hf, indent=2) + "\n")

    def write(self, read: Callable[[list[str]], Mapping[str, Tensor]], rank: int = 0, world: int = 1) -> None:
        """Write this rank's share of the safetensors files; `read` returns model tensors by name.

        Raises:
            OSError: if writing fails.
        """
        with self._reporting_errors():
            write_weights(
                self.model,
                self.partial,
                self.format.weights(self.model.config),
                dtype=self.dtype,
                max_shard_bytes=self.max_shard_bytes,
                read=read,
                rank=rank,
                world=world,
            )

    def finish(self) -> None:
        """Move all files to the target directory, config.json last: without it, the directory is not a model.

        Raises:
            OSError: if moving fails.
        """
        with self._reporting_errors():
            for file in sorted(self.partial.iterdir(), key=lambda file: file.name == CONFIG):
                file.rename(self.directory / file.name)
            self.partial.rmdir()

    def abandon(self) -> None:
        """Delete all files written so far."""
        shutil.rmtree(self.partial, ignore_errors=True)

    @contextmanager
    def _reporting_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            number = error.errno if isinstance(error, OSError) else None
            raise OSError(
                number or errno.EIO,
                f"could not write the model to {self.directory}: {error}; all its files were removed",
            ) from error


def _format_of(model: Any) -> HuggingFace:
    if not hasattr(model, "config"):
        known = ", ".join(family.model.__name__ for family in FAMILIES)
        raise ValueError(f"cannot save a {type(model).__name__} as a Hugging Face directory; expected one of {known}")
    family = family_of(model.config)
    if family.hf is None:
        raise ValueError(
            f"the family {family.name} has no Hugging Face format, so a {type(model).__name__} cannot be saved in it; "
            "pass hf=HuggingFace(...) to its Family"
        )
    return family.hf


def _dtype_of(hf: dict[str, Any]) -> torch.dtype:
    name = read_field(hf, "dtype", str) or read_field(hf, "torch_dtype", str, "float32")
    dtype = getattr(torch, name, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"config.json has dtype {name!r}; expected float32, bfloat16 or float16")
    return dtype
