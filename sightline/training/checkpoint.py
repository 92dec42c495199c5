"""Checkpoints: written aside and renamed, so that the newest one is always whole.

checkpoints/.step-120.partial/     being written, or left by a kill: removed at the next start
checkpoints/step-120/              whole
    .metadata, *.distcp            weights, moments, random number state: torch.distributed.checkpoint
    state.json                     step and the loader's place
    config.json, tokenizer.json    the run's
    manifest.json                  every file and its size, written last

All processes of a run write their parts into the same directory, and nothing in it tells how many they were: weights
and moments go by the names they have in the whole model, and each process reads the parts it has, whoever wrote them.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
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
    """Where a run stands between two steps."""

    step: int
    loader: dict[str, Any]
    """The place of this process's loader when it is saved, of all processes' together when it is loaded."""


class CannotSave(OSError):
    """The disk did not take the checkpoint; what was written of it is gone, older ones are as they were."""


def tensors(model: Any, optimizer: Optimizer, device: torch.device) -> dict[str, Any]:
    """What torch.distributed.checkpoint writes, and reads in place: this process's parts.

    The random number state is written once. It is the same on all processes, because what they draw they draw together:
    weights are drawn by their names, and training draws nothing.
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
    """Write `directory/step-N` from `tensors(...)`, then remove all but the newest `keep`.

    group  all processes of the run, each of which calls this; None where there is one

    Errors: CannotSave on every process, when the disk of one of them is full or refuses otherwise.
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
                    f"{partial} is not there, though rank 0 made it: the output directory of a run on several machines "
                    "must lie on a disk that all of them see",
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
    """What stands inside is done on every process, or all of them learn which one could not.

    Errors: CannotSave on every process, for the OSError of one.
    """
    failure: OSError | None = None
    try:
        yield
    except OSError as error:
        failure = error
    for rank, told in enumerate(_gather(failure and (failure.errno, failure.strerror or str(failure)), group)):
        if told:
            number, reason = told
            raise _cannot_save(number, reason, rank, group) from failure


def _write_files(directory: Path, state: dict[str, Any], run_files: list[Path]) -> None:
    """Everything but the tensors, which are there; and all of it on the disk."""
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
    """Read a checkpoint into `tensors(...)`, as `read_tensors`, and set the random number state."""
    read_tensors(checkpoint, state, group)
    torch.set_rng_state(state["random"]["cpu"])
    if "cuda" in state["random"]:
        torch.cuda.set_rng_state(state["random"]["cuda"], device)
    written = json.loads((checkpoint / STATE).read_text())
    return Progress(step=written["step"], loader=written["loader"])


def read_tensors(checkpoint: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Read the tensors that `state` holds, in place; it may hold only a part of what the checkpoint has.

    All processes of `group` call it.

    Raises:
        ValueError: for what is no checkpoint, not whole, or of another model.
    """
    check_checkpoint(checkpoint)
    reader = dcp.FileSystemReader(checkpoint)
    try:
        stored = reader.read_metadata().state_dict_metadata
        if "random" in state:
            # A run may move to another device: what was drawn on a GPU is then not needed, or not there.
            state["random"] = {name: value for name, value in state["random"].items() if f"random.{name}" in stored}
        if "model" in state:
            state = {**state, "model": _names_in(stored, state["model"])}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(state, storage_reader=reader, process_group=group, no_dist=group is None)
    except (CheckpointException, Exception) as error:  # the former is no Exception
        raise ValueError(
            f"{checkpoint} cannot be read: {_reason(error)}; expected a whole checkpoint of this model. "
            f"{_remedy(checkpoint)}"
        ) from error


def _names_in(stored: Mapping[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The model's tensors by the names in a checkpoint: before version 0.3 `expert_bias` was called `balance`."""
    old = {name: re.sub(r"\bexpert_bias$", "balance", name) for name in tensors}
    return {old[name] if f"model.{old[name]}" in stored else name: tensor for name, tensor in tensors.items()}


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


class _Writer(dcp.FileSystemWriter):
    """One whose error says what the disk said: torch wraps it in its zip writer, and processes tell each other only the
    outermost."""

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
    """dcp.save. Its error is raised on all processes."""
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
    """The value of every process, on all of them."""
    if group is None:
        return [value]
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


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
