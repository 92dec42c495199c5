"""Checkpoints: written aside and renamed, so that the newest one is always whole.

checkpoints/.step-120.partial/     being written, or left by a kill: removed at the next start
checkpoints/step-120/              whole
    .metadata, *.distcp            weights, moments, random number state: torch.distributed.checkpoint
    state.json                     step and the loader's place
    config.json, tokenizer.json    the run's
    manifest.json                  every file and its size, written last
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import AdamW

from sightline.training.optimizer import optimizer_state

MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Progress:
    """Where a run stands between two steps."""

    step: int
    loader: dict[str, Any]


class CannotSave(OSError):
    """The disk did not take the checkpoint; what was written of it is gone, older ones are as they were."""


def tensors(model: nn.Module, optimizer: AdamW, device: torch.device) -> dict[str, Any]:
    """What torch.distributed.checkpoint writes, and reads in place."""
    random = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    return {"model": model.state_dict(), "optimizer": optimizer_state(model, optimizer), "random": random}


def save_checkpoint(
    directory: Path, state: dict[str, Any], progress: Progress, run_files: list[Path], *, keep: int
) -> Path:
    """Write `directory/step-N` from `tensors(...)`, then remove all but the newest `keep`.

    Errors: CannotSave when the disk is full or refuses otherwise.
    """
    final = directory / f"step-{progress.step}"
    partial = directory / f".{final.name}.partial"
    try:
        partial.mkdir(parents=True)
        _write_tensors(state, partial)
        for file in run_files:
            shutil.copyfile(file, partial / file.name)
        (partial / STATE).write_text(json.dumps({"step": progress.step, "loader": progress.loader}))
        sizes = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({"files": sizes}, indent=2))
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        partial.rename(final)
        sync(directory)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CannotSave(error.errno, error.strerror) from error
    for old in list_checkpoints(directory)[:-keep]:
        remove_checkpoint(old)
    return final


def load_checkpoint(checkpoint: Path, state: dict[str, Any], device: torch.device) -> Progress:
    """Read a checkpoint into `tensors(...)`, in place, and set the random number state.

    Errors: ValueError for what is no checkpoint, not whole, or of another model.
    """
    read_tensors(checkpoint, state)
    torch.set_rng_state(state["random"]["cpu"])
    if "cuda" in state["random"]:
        torch.cuda.set_rng_state(state["random"]["cuda"], device)
    written = json.loads((checkpoint / STATE).read_text())
    return Progress(step=written["step"], loader=written["loader"])


def read_tensors(checkpoint: Path, state: dict[str, Any]) -> None:
    """Read the tensors that `state` holds, in place; it may hold only a part of what the checkpoint has.

    Errors: as `load_checkpoint`.
    """
    check_checkpoint(checkpoint)
    reader = dcp.FileSystemReader(checkpoint)
    try:
        if "random" in state:
            # A run may move to another device: what was drawn on a GPU is then not needed, or not there.
            stored = reader.read_metadata().state_dict_metadata
            state["random"] = {name: value for name, value in state["random"].items() if f"random.{name}" in stored}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=reader, no_dist=True)
    except (CheckpointException, Exception) as error:  # the former is no Exception
        raise ValueError(
            f"{checkpoint} cannot be read: {_reason(error)}; expected a whole checkpoint of this model. "
            f"{_remedy(checkpoint)}"
        ) from error


def check_checkpoint(checkpoint: Path) -> None:
    """Refuse what is no checkpoint, or one that is not whole.

    Errors: ValueError naming the file that is missing or has another size than when it was written.
    """
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        raise ValueError(
            f"{checkpoint} is not a checkpoint: it has no {MANIFEST}. A checkpoint is a directory named step-N in "
            "the `checkpoints` of a run"
        )
    try:
        sizes = json.loads(manifest.read_text())["files"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{manifest} is damaged: {error}. {_remedy(checkpoint)}") from error
    for name, size in sizes.items():
        file = checkpoint / name
        came = file.stat().st_size if file.is_file() else None
        if came != size:
            what = "is missing" if came is None else f"has {came} bytes"
            raise ValueError(
                f"{checkpoint} is cut short: {name} {what}, it was written with {size}. {_remedy(checkpoint)}"
            )


def list_checkpoints(directory: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of)


def find_latest(directory: Path) -> Path | None:
    """The newest checkpoint of a run's `checkpoints`, or None."""
    found = list_checkpoints(directory)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """The N of step-N."""
    return int(checkpoint.name.removeprefix("step-"))


def remove_checkpoint(checkpoint: Path) -> None:
    """Through the name of a partial one, so that a kill in between leaves nothing that looks whole."""
    partial = checkpoint.with_name(f".{checkpoint.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def remove_partial(directory: Path) -> None:
    """Clear what a killed save or removal left."""
    for partial in directory.glob(".step-*.partial"):
        shutil.rmtree(partial)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_tensors(state: dict[str, Any], directory: Path) -> None:
    """dcp.save, with the OSError underneath if there is one: torch wraps it twice, in its zip writer and in DCP."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(state, storage_writer=dcp.FileSystemWriter(directory, sync_files=False), no_dist=True)
    except CheckpointException as exception:
        for error, _ in exception.failures.values():
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, OSError):
                    raise cause from exception
                cause = cause.__cause__ or cause.__context__
        raise


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, pickle.UnpicklingError):
        return "what is in it is damaged"  # torch's own text advises to load it unsafely
    return f"{type(error).__name__}: {error}"


def _remedy(checkpoint: Path) -> str:
    older = [other for other in list_checkpoints(checkpoint.parent) if step_of(other) < step_of(checkpoint)]
    if not older:
        return f"Delete {checkpoint} and start again"
    return f"Delete it to continue from {older[-1]}, the one before"
