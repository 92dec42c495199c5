"""Where a run begins: anew, or from a checkpoint that its config may continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sightline.training.checkpoint import CONFIG, check_checkpoint, find_latest, step_of
from sightline.training.run_directory import RunDirectory, find_checkpoint, load_config, settings

MUST_MATCH = (
    *("family", "model", "model_from", "data", "seed", "training.sequence_length", "training.global_batch_size"),
    "optimizer.name",
)
"""With another value of these it would be another run: other weights, documents, batch or optimizer state."""
MAY_CHANGE_SILENTLY = ("output_dir", "logging", "checkpoint", "parallel.timeout")
"""Of no meaning to the numbers. Whatever is in neither may change, and is said."""


def find_start(resume: str, directory: RunDirectory) -> Path | None:
    """The checkpoint to continue from by `checkpoint.resume`, or None to begin anew. Looks only, changes nothing.

    Errors: ValueError where that would overwrite something or the path names no checkpoint.
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
            load_config(directory.config)  # refuses the config.json of something else
        return latest
    start = find_checkpoint(Path(resume).expanduser())
    check_checkpoint(start)
    if latest is not None and step_of(latest) > step_of(start):
        raise ValueError(
            f"checkpoint.resume {start} is of step {step_of(start)}, but {directory.path} already goes to step "
            f"{step_of(latest)}. Choose another --output-dir to branch off there, or --checkpoint.resume auto to "
            f"continue from {latest}"
        )
    return start


def check_continues(checkpoint: Path, run_settings: dict[str, Any]) -> list[str]:
    """What differs between the `settings` of the run that wrote `checkpoint` and these, in words.

    Errors: ValueError where a field differs that makes it another run.
    """
    before, now = flat(settings(load_config(checkpoint / CONFIG))), flat(run_settings)
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    refused = [name for name in changed if name.startswith(MUST_MATCH)]
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


CONSEQUENCES = {
    "training.steps": ": the learning rate from here on is that of the new number of steps, what is done was not",
    "training.micro_batch_size": ": the same gradients up to rounding",
    "parallel.": ": the same numbers up to rounding",
}
"""Of a field, or of all whose names begin so."""


def consequence(name: str) -> str:
    return next((words for beginning, words in CONSEQUENCES.items() if name.startswith(beginning)), "")


def option(name: str, value: Any) -> str:
    """How the command line says that: `--model.intermediate-size 64`, `--model.no-tied-embeddings`, `no --model-from` for None."""
    group, _, field = name.replace("_", "-").rpartition(".")
    prefix = f"--{group}." if group else "--"
    if value is None:
        return f"no {prefix}{field}"
    return f"{prefix}{'' if value else 'no-'}{field}" if isinstance(value, bool) else f"{prefix}{field} {value}"


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} becomes {"a.b": 1}."""
    if not isinstance(config, dict):
        return {prefix: config}
    flattened: dict[str, Any] = {}
    for name, value in config.items():
        flattened |= flat(value, f"{prefix}.{name}" if prefix else name)
    return flattened
