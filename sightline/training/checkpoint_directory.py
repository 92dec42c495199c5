"""The `checkpoints` directory of a run: step-N by number, and the removal of directories."""

from __future__ import annotations

import math
import os
import re
import shutil
from pathlib import Path

MANIFEST = "manifest.json"
NAME = re.compile(r"step-\d{1,18}")
"""Names of checkpoints."""


def is_run(path: Path) -> bool:
    """Return whether a path is the directory of a run, or one of its checkpoints, complete or not."""
    is_checkpoint = path.name.startswith("step-") and path.parent.name == "checkpoints"
    return is_checkpoint or (path / MANIFEST).exists() or (path / "checkpoints").is_dir()


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    found = [path for path in directory.glob("step-*") if NAME.fullmatch(path.name)]
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


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it is none any more, and return its new path."""
    names = (f"{checkpoint.name}.damaged{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    aside = next(path for path in map(checkpoint.with_name, names) if not path.exists())
    checkpoint.rename(aside)
    return aside


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


def remedy(checkpoint: Path) -> str:
    """Return what to do about a checkpoint that cannot be used."""
    step = step_of(checkpoint) if NAME.fullmatch(checkpoint.name) else math.inf
    older = [other for other in list_checkpoints(checkpoint.parent) if step_of(other) < step]
    if not older:
        return f"There is no older checkpoint beside it: use a copy of it, or delete {checkpoint} and start again"
    return f"Use {older[-1]}, the one before"
