"""Checkpoints, written to a temporary directory and renamed, so that a kill leaves no incomplete checkpoint.

checkpoints/.step-120.partial/     being written, or left by a killed process: removed at the next start
checkpoints/step-120/              complete
    rank-00000.safetensors, ...    weights, optimizer state, random number state: a file per rank, see `shards`
    state.json                     step and loader state
    config.json, tokenizer.json    copies of the run's files
    manifest.json                  size and checksum of every file, written last
checkpoints/step-100.damaged/      found damaged at a start, and kept for its owner to look at

All ranks write into the same directory. Tensors are stored under their names in the full model, so a checkpoint does
not depend on the device mesh, and each rank reads the shards that it needs.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from sightline.data import join_states
from sightline.parallel.host import HostGroup
from sightline.parallel.mesh import AXES, Mesh
from sightline.paths import file_inside
from sightline.training.checkpoint_directory import list_checkpoints, remove_checkpoint, sync
from sightline.training.manifest import (
    VERSION,
    Damaged,
    FileSum,
    Manifest,
    find_damage,
    read_manifest,
    shard_file,
    share_files,
    write_file,
)
from sightline.training.nested import flatten
from sightline.training.old_checkpoints import read_index, read_old_tensors
from sightline.training.optimizer import Optimizer, optimizer_state
from sightline.training.shards import RANDOM, count_elements, read_shards, shards_to_write, write_shards

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
    """Return the tensors of a checkpoint, which reading fills in place: this rank's shards.

    The random number state is stored once, because it is the same on all ranks: weight initialization has a generator
    per weight, and training uses no random numbers.
    """
    random = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state(device)
    return {"model": model.state_dict(), "optimizer": optimizer_state(model, optimizer), "random": random}


class LocalState(NamedTuple):
    """The part of a checkpoint that this rank writes.

    shards    tensors by their name in the file
    elements  see `count_elements`
    mesh      degree of each parallelism
    loader    state of the loader, on one of the ranks that read the same rows; None on the others
    """

    shards: dict[str, Tensor]
    elements: int
    mesh: dict[str, int]
    step: int
    loader: dict[str, Any] | None

    def copied(self) -> LocalState:
        """Return the state with copies of the tensors in CPU memory, which the next steps do not change."""
        return self._replace(shards={name: tensor.to("cpu", copy=True) for name, tensor in self.shards.items()})


def local_state(state: dict[str, Any], progress: Progress, mesh: Mesh | None = None) -> LocalState:
    """Return the part of `tensors(...)` that this rank writes."""
    axes = ("context", "tensor", "pipeline")
    reports_loader = mesh is None or all(mesh.index(axis) == 0 for axis in axes)
    return LocalState(
        shards=shards_to_write(state, mesh),
        elements=count_elements(state, mesh),
        mesh=degrees(mesh),
        step=progress.step,
        loader=progress.loader if reports_loader else None,
    )


def degrees(mesh: Mesh | None) -> dict[str, int]:
    """Return the degree of each parallelism that decides which rank writes which shard."""
    return {axis: mesh.size(axis) if mesh else 1 for axis in (*AXES, "expert")}


def save_checkpoint(
    directory: Path,
    local: LocalState,
    run_files: list[Path],
    *,
    keep: int,
    verified: Path | None = None,
    host: HostGroup | None = None,
) -> Path:
    """Write `directory/step-N`, then remove all but the newest `keep` checkpoints.

    verified  checkpoint to keep in addition: the newest whose contents a start has verified
    host      all ranks of the run, each of which calls this function; None for one process

    Raises:
        CannotSave: on every rank, if one of them cannot write, for example because the disk is full.
    """
    host = host or HostGroup(alone=True)
    final = directory / f"step-{local.step}"
    partial = directory / f".{final.name}.partial"
    on_rank_zero(host, lambda: partial.mkdir(parents=True))
    written, failure = FileSum(0, None), None
    try:
        if not partial.is_dir():
            raise FileNotFoundError(
                errno.ENOENT,
                f"{partial} does not exist, although rank 0 created it: the output directory of a multi-node run "
                "must be on a file system that all nodes share",
            )
        written = write_shards(partial / shard_file(host.rank), local.shards)
    except OSError as error:
        failure = error
    count = sum(tensor.numel() for tensor in local.shards.values())
    reports = host.gather((written, count, local.elements, local.loader, failure))

    def commit() -> None:
        try:
            for rank, (*_, failed) in enumerate(reports):
                if failed is not None:
                    raise OSError(failed.errno, _on_rank(host, rank, failed.strerror or str(failed)))
            _commit(partial, final, local, reports, run_files)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    on_rank_zero(host, commit)
    if host.rank == 0:
        for old in list_checkpoints(directory)[:-keep]:
            if old != verified:
                remove_checkpoint(old)
    return final


def _commit(
    partial: Path, final: Path, local: LocalState, reports: list[tuple[Any, ...]], run_files: list[Path]
) -> None:
    """Write all files except the shards, which are already on disk, and rename the directory."""
    sums, counts, elements, loaders, _ = zip(*reports, strict=True)
    assert sum(counts) == sum(elements), f"{sum(counts)} of {sum(elements)} elements were written"
    files = {shard_file(rank): written for rank, written in enumerate(sums)}
    for file in run_files:
        files[file.name] = write_file(partial / file.name, file.read_bytes())
    loader = join_states([state for state in loaders if state is not None])
    files[STATE] = write_file(partial / STATE, json.dumps({"step": local.step, "loader": loader}).encode())
    Manifest(files, local.mesh).write(partial)
    sync(partial)
    partial.rename(final)
    sync(final.parent)


def on_rank_zero(host: HostGroup, write: Callable[[], object]) -> None:
    """Call `write` on rank 0 alone, and raise its error on every rank.

    Raises:
        CannotSave: on every rank, if it raised OSError.
    """
    try:
        host.from_rank_zero(lambda: write() and None)
    except OSError as error:
        raise CannotSave(error.errno, _on_rank(host, 0, error.strerror or str(error))) from error


@contextmanager
def on_all_ranks(host: HostGroup) -> Iterator[None]:
    """Run the `with` block on every rank, and raise an error on all of them if it fails on one.

    Raises:
        CannotSave: on every rank, if the block raised OSError on one.
    """
    failure: OSError | None = None
    try:
        yield
    except OSError as error:
        failure = error
    found = host.first_error(failure)
    if found is not None:
        rank, raised = found
        assert isinstance(raised, OSError)
        raise CannotSave(raised.errno, _on_rank(host, rank, raised.strerror or str(raised))) from failure


def _on_rank(host: HostGroup, rank: int, reason: str) -> str:
    return reason if host.world == 1 or reason.startswith("rank ") else f"rank {rank}: {reason}"


def load_checkpoint(
    checkpoint: Path,
    state: dict[str, Any],
    device: torch.device,
    mesh: Mesh | None = None,
    host: HostGroup | None = None,
) -> Progress:
    """Read a checkpoint into `tensors(...)` in place and set the random number state. As `read_tensors`."""
    missing = read_tensors(checkpoint, state, mesh, host)
    if f"{RANDOM}cpu" not in missing:
        torch.set_rng_state(state["random"]["cpu"])
    if "cuda" in state["random"] and f"{RANDOM}cuda" not in missing:
        torch.cuda.set_rng_state(state["random"]["cuda"], device)
    return read_progress(checkpoint)


def read_tensors(
    checkpoint: Path, state: dict[str, Any], mesh: Mesh | None = None, host: HostGroup | None = None
) -> set[str]:
    """Read the tensors of `state` in place; return the names of random number states that the checkpoint lacks.

    The checkpoint may have more tensors. It may have been written on another device, whose random number state differs.

    mesh  the mesh of this run, None for full tensors
    host  all ranks, each of which calls this function: rank 0 reads the manifest for all; None for this process alone

    Raises:
        ValueError: if the directory is not a checkpoint, is damaged, or belongs to another model.
        OSError: if the file system has an error.
    """

    def read_layout() -> tuple[int, dict[str, int], int]:
        manifest = read_manifest(checkpoint)
        return manifest.version, manifest.mesh, manifest.ranks

    version, saved_mesh, ranks = (host or HostGroup(alone=True)).from_rank_zero(read_layout)
    wanted = flatten(state)
    try:
        if version < VERSION:
            return read_old_tensors(checkpoint, wanted, optional=RANDOM)
        on_equal_mesh = mesh if mesh is not None and degrees(mesh) == saved_mesh else None
        return read_shards(checkpoint, wanted, ranks, optional=RANDOM, mesh=on_equal_mesh)
    except FileNotFoundError as error:
        raise Damaged(checkpoint, f"{Path(error.filename or '').name} is missing") from error
    except (ValueError, SafetensorError) as error:
        if isinstance(error, Damaged):
            raise
        raise ValueError(f"{checkpoint} cannot be read: {error}; expected a checkpoint of this model") from error


def read_progress(checkpoint: Path) -> Progress:
    """Return the progress of a checkpoint.

    Raises:
        Damaged: if state.json cannot be read.
    """
    try:
        written = json.loads(file_inside(checkpoint, STATE).read_bytes())
        return Progress(step=int(written["step"]), loader=dict(written["loader"]))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise Damaged(checkpoint, f"{STATE} is not the state of a run ({type(error).__name__}: {error})") from error


def check_checkpoint(checkpoint: Path, *, contents: bool = True, host: HostGroup | None = None) -> None:
    """Compare the files of a checkpoint with its manifest.

    contents  also verify the checksums, which reads every byte; otherwise only sizes
    host      all ranks, each of which calls this function and verifies some of the files; None for this process alone

    Raises:
        Damaged: on every rank, if a file is missing or is not as it was written.
        ValueError: if a newer version of Sightline has written it.
        OSError: if the file system has an error, which says nothing about the checkpoint.
    """
    host = host or HostGroup(alone=True)
    files: dict[str, FileSum] = {}

    def read_files() -> int:
        manifest = read_manifest(checkpoint)
        files.update(manifest.files)
        return manifest.version

    version = host.from_rank_zero(read_files)
    share = host.scatter(share_files(files, host.world))
    failure: Exception | None = None
    try:
        problem = find_damage(checkpoint, share, contents=contents)
        if problem is not None:
            raise Damaged(checkpoint, problem)
        if version < VERSION and host.rank == 0:
            _check_old_contents(checkpoint, files)
    except (OSError, ValueError) as error:
        failure = error
    found = host.first_error(failure)
    if found is not None:
        raise found[1]


def _check_old_contents(checkpoint: Path, names: Iterable[str]) -> None:
    """Parse the small files of a checkpoint of version 0.2, whose manifest has no checksums."""
    for name in names:
        if name.endswith(".json"):
            try:
                json.loads(file_inside(checkpoint, name).read_bytes())
            except (ValueError, RecursionError) as error:
                raise Damaged(checkpoint, f"{name} is not JSON ({error})") from error
    read_index(checkpoint)
    read_progress(checkpoint)
