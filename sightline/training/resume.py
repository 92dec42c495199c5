"""Find the checkpoint that a run resumes from, and check that its config allows it."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from sightline.config import CheckpointConfig
from sightline.parallel.host import HostGroup
from sightline.training.checkpoint import CONFIG, check_checkpoint
from sightline.training.checkpoint_directory import find_latest, remove_partial, set_aside, step_of
from sightline.training.manifest import Damaged
from sightline.training.nested import flatten
from sightline.training.run_directory import (
    KERNEL,
    RunDirectory,
    find_checkpoint,
    load_config,
    recorded_kernel,
    settings,
)

MUST_MATCH = (
    *("family", "model", "model_from", "data", "seed", "training.sequence_length", "training.global_batch_size"),
    "optimizer.name",
)
"""Fields that must not change on resume, because they define the weights, documents, batches and optimizer state."""
MAY_CHANGE = ("data.epochs", "data.cache_dir")
"""Fields of a section in MUST_MATCH that may change nevertheless."""
MAY_CHANGE_SILENTLY = ("output_dir", "logging", "checkpoint", "parallel.timeout", "data.cache_dir")
"""Fields that do not affect results. Fields in no list may change on resume, with a warning."""


def acquire_start(
    directory: RunDirectory,
    options: CheckpointConfig,
    run_settings: dict[str, Any],
    host: HostGroup,
    opened: ExitStack,
) -> tuple[Path | None, list[str]]:
    """Lock the directory; return the checkpoint to resume from, and warnings about damage and changed options.

    host    all ranks, each of which calls this function
    opened  closes the lock

    Raises:
        ValueError: if the run cannot start in this directory, or not from this checkpoint.
    """
    host.from_rank_zero(directory.check_writable)
    start = host.from_rank_zero(lambda: find_start(options.resume, directory))
    warnings: list[str] = []

    def lock() -> None:
        opened.enter_context(directory.lock())
        remove_partial(directory.checkpoints)

    is_path = options.resume not in ("auto", "never")
    if is_path:
        assert start is not None, "find_start returns the path or raises"
        check_checkpoint(start, contents=options.verify, host=host)
    else:
        host.from_rank_zero(lock)  # before damaged checkpoints are renamed
        start, warnings = pass_over_damage(directory, contents=options.verify, host=host)
    if start is not None:
        warnings += host.from_rank_zero(lambda: check_continues(start, run_settings))
    if is_path:
        host.from_rank_zero(lock)  # a path that is refused leaves no directory
    return start, warnings


def find_start(resume: str, directory: RunDirectory) -> Path | None:
    """Return the checkpoint to resume from, or None to start a new run. Changes no files.

    resume  the option `checkpoint.resume`

    Raises:
        ValueError: if the run would overwrite existing files, or the path is not a checkpoint.
    """
    latest = find_latest(directory.checkpoints)
    if resume == "never":
        if directory.path.exists() and any(directory.path.iterdir()):
            raise ValueError(
                f"{directory.path} is not empty and checkpoint.resume is 'never': expected an empty directory. Choose "
                "another --output-dir, or --checkpoint.resume auto to continue"
            )
        return None
    if resume == "auto":
        if latest is None and directory.config.exists():
            load_config(directory.config)  # raises if the config.json is not that of a run
        return latest
    start = find_checkpoint(Path(resume).expanduser())
    if latest is not None and step_of(latest) > step_of(start):
        raise ValueError(
            f"checkpoint.resume {start} is of step {step_of(start)}, but {directory.path} already has step "
            f"{step_of(latest)}. Choose another --output-dir to resume from there, or --checkpoint.resume auto to "
            f"continue from {latest}"
        )
    return start


def pass_over_damage(directory: RunDirectory, *, contents: bool, host: HostGroup) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is not damaged, or None, and a warning for each damaged one.

    A damaged checkpoint is renamed, so that it is not found again, and kept. All ranks call this function; see
    `check_checkpoint` for the arguments and for errors other than damage.
    """
    warnings: list[str] = []
    while (checkpoint := host.from_rank_zero(lambda: find_latest(directory.checkpoints))) is not None:
        try:
            check_checkpoint(checkpoint, contents=contents, host=host)
            break
        except Damaged as error:
            aside = host.from_rank_zero(partial(set_aside, checkpoint))
            warnings.append(f"{checkpoint.name} is damaged: {error.problem}. It was passed over and renamed to {aside}")
    if warnings and checkpoint is None:
        warnings.append(f"no older checkpoint in {directory.checkpoints} is whole: the run starts again from step 0")
    return checkpoint, warnings


def check_continues(checkpoint: Path, run_settings: dict[str, Any]) -> list[str]:
    """Compare `settings` with those of the run that wrote `checkpoint`; return a warning for each allowed change.

    Raises:
        ValueError: if a field in `MUST_MATCH` differs.
    """
    config = checkpoint / CONFIG
    before, now = flatten(settings(load_config(config), recorded_kernel(config))), flatten(run_settings)
    if KERNEL not in before.keys() & now.keys():  # a run on GPUs, or of an older version
        before.pop(KERNEL, None), now.pop(KERNEL, None)
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    refused = [name for name in changed if name.startswith(MUST_MATCH) and name not in MAY_CHANGE]
    if refused:
        differences = "; ".join(f"{name} is {now.get(name)!r}, expected {before.get(name)!r}" for name in refused)
        options = " ".join(option(name, before.get(name)) for name in refused if name != "family")
        raise ValueError(
            f"cannot continue from {checkpoint} with another config: {differences}. Give the values it was trained "
            f"with ({options}), or choose another --output-dir to start a new run"
        )
    return [
        f"{name} is now {now.get(name)!r}, was {before.get(name)!r}" + consequence(name)
        for name in changed
        if not name.startswith(MAY_CHANGE_SILENTLY)
    ]


NEW_SCHEDULE = ": the learning rate follows the schedule of the new number of steps from here on"
CONSEQUENCES = {
    "training.steps": NEW_SCHEDULE,
    "data.epochs": NEW_SCHEDULE,
    "training.micro_batch_size": ": the same gradients up to rounding",
    "parallel.": ": the same numbers up to rounding",
    KERNEL: ": the same numbers up to rounding",
}
"""Consequence of a change, by the first characters of the field name."""


def consequence(name: str) -> str:
    """Return the text that follows the warning about a changed field."""
    return next((text for prefix, text in CONSEQUENCES.items() if name.startswith(prefix)), "")


def option(name: str, value: Any) -> str:
    """Return the option as text: `--model.num-layers 2`, `--model.no-tied-embeddings`, `no --model-from` for None."""
    group, _, field = name.replace("_", "-").rpartition(".")
    prefix = f"--{group}." if group else "--"
    if value is None:
        return f"no {prefix}{field}"
    return f"{prefix}{'' if value else 'no-'}{field}" if isinstance(value, bool) else f"{prefix}{field} {value}"
