"""Checkpoints, written to a temporary directory and renamed, so that the newest checkpoint is always complete.

checkpoints/.step-120.partial/     being written, or left by a killed process: removed at the next start
checkpoints/step-120/              complete
    .metadata, *.distcp            weights, optimizer state, random number state: torch.distributed.checkpoint
    state.json                     step and loader state
    config.json, tokenizer.json    copies of the run's files
    manifest.json                  name and size of every file, written last

All ranks write their shards into the same directory. Tensors are stored under their names in the full model, so a
checkpoint does not depend on the device mesh, and each rank reads the shards that it needs.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from sightline.data import join_states
from sightline.training.optimizer import Optimizer, optimizer_state

MANIFEST = "manifest.json"
STATE = "state.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Progress:
    """State of a run between two steps, besides tensors."""

    step: int
    loader: dict[str, Any]
    """State of the local loader when saving; joined state of the loaders of all ranks after loading."""


class CannotSave(OSError):
    """The checkpoint could not be written. Its files are removed, and older checkpoints are unchanged."""


def tensors(model: Any, optimizer: Optimizer, device: torch.device) -> dict[str, Any]:
    """Return the state dict that torch.distributed.checkpoint writes, and reads in place: the local shards.

    The random number state is stored once, because it is the same on all ranks: weight initialization has a generator
    per weight, and training uses no random numbers.
    """
    random = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    return {"model": model.state_dict(), "optimizer": optimizer_state(model, optimizer), "random": random}


def save_checkpoint(
    directory: Path,
    state: dict[str, Any],
    progress: Progress,
    run_files: list[Path],
    *,
    keep: int,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write `directory/step-N` from `tensors(...)`, then remove all but the newest `keep` checkpoints.

    group  all ranks of the run, each of which calls this function; None for one process

    Raises:
        CannotSave: on every rank, if one of them cannot write, for example because the disk is full.
    """
    final = directory / f"step-{progress.step}"
    partial = directory / f".{final.name}.partial"
    first = group is None or dist.get_rank(group) == 0
    loader = join_states(_gather(progress.loader, group))
    try:
        with on_all_processes(group):
            if first:
                partial.mkdir(parents=True)
        with on_all_processes(group):
            if not partial.is_dir():
                raise FileNotFoundError(
                    errno.ENOENT,
                    f"{partial} does not exist, although rank 0 created it: the output directory of a multi-node run "
                    "must be on a file system that all nodes share",
                )
        _write_tensors(state, partial, group)
        with on_all_processes(group):
            if first:
                _write_files(partial, {"step": progress.step, "loader": loader}, run_files)
                partial.rename(final)
                sync(directory)
    except CannotSave:
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if first:
        for old in list_checkpoints(directory)[:-keep]:
            remove_checkpoint(old)
    return final


@contextmanager
def on_all_processes(group: dist.ProcessGroup | None) -> Iterator[None]:
    """Run the `with` block on every rank, and raise an error on all of them if it fails on one.

    Raises:
        CannotSave: on every rank, if the block raised OSError on one.
    """
    failure: OSError | None = None
    try:
        yield
    except OSError as error:
        failure = error
    failures = _gather(failure and (failure.errno, failure.strerror or str(failure)), group)
    for rank, failed in enumerate(failures):
        if failed:
            number, reason = failed
            raise _cannot_save(number, reason, rank, group) from failure


def _write_files(directory: Path, state: dict[str, Any], run_files: list[Path]) -> None:
    """Write all files except the tensors, which are already there, and flush everything to disk."""
    for file in run_files:
        shutil.copyfile(file, directory / file.name)
    (directory / STATE).write_text(json.dumps(state))
    sizes = {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
    (directory / MANIFEST).write_text(json.dumps({"files": sizes}, indent=2))
    for file in directory.iterdir():
        sync(file)
    sync(directory)


def load_checkpoint(
    checkpoint: Path, state: dict[str, Any], device: torch.device, group: dist.ProcessGroup | None = None
) -> Progress:
    """Read a checkpoint into `tensors(...)` in place and set the random number state. Raises like `read_tensors`."""
    read_tensors(checkpoint, state, group)
    torch.set_rng_state(state["random"]["cpu"])
    if "cuda" in state["random"]:
        torch.cuda.set_rng_state(state["random"]["cuda"], device)
    written = json.loads((checkpoint / STATE).read_text())
    return Progress(step=written["step"], loader=written["loader"])


def read_tensors(checkpoint: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Read the tensors of `state` in place. The checkpoint may have more tensors. All ranks of `group` call this.

    Raises:
        ValueError: if the directory is not a checkpoint, is incomplete, or belongs to another model.
    """
    check_checkpoint(checkpoint)
    reader = dcp.FileSystemReader(checkpoint)
    try:
        renamed = _names_in_0_2(state.get("model", {}))
        stored = reader.read_metadata().state_dict_metadata if renamed or "random" in state else {}
        if "random" in state:
            # A run may resume on another device, whose random number state the checkpoint may lack.
            state["random"] = {name: value for name, value in state["random"].items() if f"random.{name}" in stored}
        old = {name: old for name, old in renamed.items() if f"model.{old}" in stored}
        if old:
            state = {**state, "model": {old.get(name, name): tensor for name, tensor in state["model"].items()}}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=reader, process_group=group, no_dist=group is None)
    except (CheckpointException, Exception) as error:  # CheckpointException is not an Exception
        raise ValueError(
            f"{checkpoint} cannot be read: {_reason(error)}; expected a complete checkpoint of this model. "
            f"{_remedy(checkpoint)}"
        ) from error


def _names_in_0_2(tensors: Iterable[str]) -> dict[str, str]:
    """Return {name: name in version 0.2} of the model's renamed tensors: `expert_bias` was called balance."""
    return {name: re.sub("expert_bias$", "balance", name) for name in tensors if name.endswith(".expert_bias")}


def check_checkpoint(checkpoint: Path) -> None:
    """Check that a directory is a complete checkpoint, by the sizes of its files.

    Raises:
        ValueError: if it is not a checkpoint, or if a file is missing or has another size than in the manifest.
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
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            problem = "is missing" if actual is None else f"has {actual} bytes"
            raise ValueError(
                f"{checkpoint} is incomplete: {name} {problem}, expected {size} bytes. {_remedy(checkpoint)}"
            )


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of)


def find_latest(directory: Path) -> Path | None:
    """Return the newest checkpoint in a run's `checkpoints`, or None."""
    found = list_checkpoints(directory)
    return found[-1] if found else None


def step_of(checkpoint: Path) -> int:
    """Return N of `step-N`."""
    return int(checkpoint.name.removeprefix("step-"))


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint; it is renamed to a partial one first, so that a kill leaves no incomplete checkpoint."""
    partial = checkpoint.with_name(f".{checkpoint.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    checkpoint.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def remove_partial(directory: Path) -> None:
    """Remove the partial checkpoints that a killed process left."""
    for partial in directory.glob(".step-*.partial"):
        shutil.rmtree(partial)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Writer(dcp.FileSystemWriter):
    """Writer that raises the original OSError: torch wraps it, and reports only the outermost error to other ranks."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, OSError):
                    raise OSError(cause.errno, cause.strerror) from error
                cause = cause.__cause__ or cause.__context__
            raise


def _write_tensors(state: dict[str, Any], directory: Path, group: dist.ProcessGroup | None) -> None:
    """Call dcp.save. Errors are raised on all ranks."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.save(state, storage_writer=_Writer(directory), process_group=group, no_dist=group is None)
    except OSError as error:
        raise _cannot_save(error.errno, error.strerror, 0, group) from error
    except CheckpointException as exception:
        for rank, (failure, _) in exception.failures.items():
            if isinstance(failure, OSError):
                raise _cannot_save(failure.errno, failure.strerror, rank, group) from exception
        raise


def _cannot_save(number: int | None, reason: str | None, rank: int, group: dist.ProcessGroup | None) -> CannotSave:
    return CannotSave(number, reason if group is None else f"rank {rank}: {reason}")


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Return the values of all ranks, on every rank."""
    if group is None:
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, pickle.UnpicklingError):
        return "its contents are damaged"  # the message of torch recommends unsafe loading
    return f"{type(error).__name__}: {error}"


def _remedy(checkpoint: Path) -> str:
    older = [other for other in list_checkpoints(checkpoint.parent) if step_of(other) < step_of(checkpoint)]
    if not older:
        return f"Delete {checkpoint} and start again"
    return f"Delete it to continue from {older[-1]}, the one before"
