"""The output directory of a run: file names, config.json, and the lock that a training process holds.

config.json  tokenizer.json  metrics.jsonl  checkpoints/step-N/  hf/step-N/  tensorboard/  loss.png  masks.png
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import typing
from pathlib import Path
from types import UnionType
from typing import Any

from sightline.config import Run
from sightline.config.checks import check_value, types_of
from sightline.config.renamed import use_new_names
from sightline.data import Tokenizer
from sightline.models import FAMILIES, Family
from sightline.models.families import named_family, reference_of
from sightline.models.hf.source import COPIED_FILES, copy_files, read_copied_fields
from sightline.paths import read_json
from sightline.training.checkpoint_directory import MANIFEST, find_latest, is_run

KERNEL = "attention_kernel"
"""Field of config.json: the attention backend that `auto` selected on this machine."""
PRETRAINED_CONFIG = "pretrained_config.json"
"""Fields of the config.json of the pretrained model, in a run that started from one, and in its checkpoints."""


class RunDirectory:
    """Paths in the output directory of a run, and its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.tokenizer = path / "tokenizer.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.exported = path / "hf"
        self.tensorboard = path / "tensorboard"
        self.loss_plot = path / "loss.png"
        self.mask_plot = path / "masks.png"

    @property
    def kept_with_checkpoints(self) -> list[Path]:
        """Files that are copied into each checkpoint, so that it can be used without the run."""
        names = ("config.json", *COPIED_FILES, PRETRAINED_CONFIG)
        return [self.path / name for name in names if name == "config.json" or (self.path / name).exists()]

    def keep_tokenizer(self, tokenizer: Tokenizer, source: Path | None) -> Tokenizer:
        """Write the tokenizer, and return it.

        source  the pretrained model or the checkpoint that the run starts from: all its tokenizer files are copied, and
                the fields of its config that an export needs, so that no later command reads other directories

        Raises:
            ValueError: if a file of the source is a link that leaves it.
        """
        pretrained = self.path / PRETRAINED_CONFIG
        pretrained.unlink(missing_ok=True)
        if source is None:
            tokenizer.save(self.tokenizer)
            return tokenizer
        copy_files(source, self.path)
        name = PRETRAINED_CONFIG if (source / PRETRAINED_CONFIG).exists() else "config.json"
        fields = read_copied_fields(source, name)
        if fields:
            pretrained.write_text(json.dumps(fields, indent=2) + "\n")
        return tokenizer

    def write_config(self, run_settings: dict[str, Any]) -> None:
        """Write config.json, which `load_config` reads."""
        temporary = self.config.with_name(".config.json.partial")
        temporary.write_text(json.dumps(run_settings, indent=2) + "\n")
        temporary.rename(self.config)  # atomic, so that a kill leaves no incomplete file

    def check_writable(self) -> None:
        """Check that the directory can be created or written. Changes no files.

        Raises:
            ValueError: if it is a file, lies below a file, or must not be written.
        """
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise ValueError(f"output_dir {self.path}: {existing} is a file; choose a directory with --output-dir")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(self._unwritable(f"{existing} is not writable"))

    def lock(self) -> typing.IO[str]:
        """Lock the directory until the returned file is closed or the process ends.

        Raises:
            ValueError: if another process holds the lock, or the directory cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / ".lock").open("w")
        except OSError as error:
            raise ValueError(self._unwritable(str(error))) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(
                f"another process is training in {self.path}; wait for it, stop it, or choose another --output-dir"
            ) from None
        return file

    def _unwritable(self, reason: str) -> str:
        return (
            f"output_dir {self.path} cannot be written: {reason}; choose another --output-dir, or permit writing to it"
        )


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint at `path`, or the newest checkpoint if `path` is the directory of a run.

    Raises:
        ValueError: if there is no checkpoint.
    """
    if (path / "checkpoints").is_dir():
        latest = find_latest(path / "checkpoints")
        if latest is None:
            raise ValueError(f"the run in {path} has no checkpoint yet; run its training command again to get one")
        return latest
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise ValueError(f"{path} {problem}; expected the directory of a run or one of its checkpoints")
    if not is_run(path):
        raise ValueError(
            f"{path} is not a checkpoint: it has no {MANIFEST}. A checkpoint is a directory named step-N in the "
            "`checkpoints` of a run"
        )
    return path


def settings(run: Run, kernel: str | None = None) -> dict[str, Any]:
    """Return all fields of a run as JSON values, with the family of its model.

    kernel  the attention backend that the run uses, where it does not follow from the options alone
    """
    return {"family": reference_of(run.model), **({KERNEL: kernel} if kernel else {}), **encode(run)}


def recorded_kernel(config: Path) -> str | None:
    """Return the attention backend that a config.json records, or None if it records none."""
    return read_json(config.parent, config.name).get(KERNEL)


def load_config(path: Path, family: Family | None = None) -> Run:
    """Read a config.json. Old field names are accepted.

    family  model family; default: the one named in the file. Nothing is imported because a file names it: a family
            outside the package must be imported already

    Raises:
        ValueError: if the file is not the config of a run, has unknown fields, or names an unknown family.
    """
    try:
        written = read_json(path.parent, path.name)
        named = written.pop("family", None)
        written.pop(KERNEL, None)
        check_value(str, named, "family")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not the config of a run ({error}); expected a config.json that `sightline train` wrote"
        ) from error
    family = family or named_family(named)
    if family is None:
        remedy = f"this version knows {', '.join(known.name for known in FAMILIES)}"
        if ":" in named:
            remedy = (
                "it is defined outside the package, and nothing is imported because a file names it. If you trust it, "
                f"use --family {named}, or in `sightline train` a Run of that module"
            )
        raise ValueError(f"{path} names the model family {named!r}; {remedy}")
    model = decode(family.config, written.pop("model", {}), f"{path}: model")
    return decode(Run, {**written, "model": model}, str(path))


def encode(value: Any) -> Any:
    """Convert a config to JSON values."""
    if dataclasses.is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {name: encode(item) for name, item in value.items()}
    return str(value) if isinstance(value, Path) else value


def decode(kind: Any, value: Any, where: str) -> Any:
    """Inverse of `encode` for a value of type `kind`. Missing fields get their defaults.

    Raises:
        ValueError: if `value` has an unknown field or another type; the message names it and `where` it is.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        check_value(dict, value, where)
        types: dict[str, Any] = types_of(kind)  # type: ignore[arg-type]
        value = use_new_names(kind, value)  # type: ignore[arg-type]
        unknown = sorted(value.keys() - types.keys())
        if unknown:
            raise ValueError(f"{where} has the field {unknown[0]!r}, which this version does not know")
        fields = {name: decode(types[name], item, f"{where}: {name}") for name, item in value.items()}
        return kind(**fields)  # type: ignore[operator]
    if origin in (typing.Union, UnionType):
        if value is None:
            return None
        return decode(next(part for part in arguments if part is not type(None)), value, where)
    if isinstance(value, list) and origin is tuple:
        value = tuple(decode(arguments[0], part, where) for part in value)
    if kind is Path:
        check_value(str, value, where)
        return Path(value)
    check_value(kind, value, where)
    return value
