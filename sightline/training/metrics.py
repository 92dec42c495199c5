"""Metrics of each optimizer step: metrics.jsonl, TensorBoard and Weights & Biases."""

from __future__ import annotations

import errno
import json
import logging
import uuid
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from sightline import config
from sightline.training.checkpoint import CannotSave
from sightline.training.checkpoint_directory import sync

try:
    import wandb
except ImportError:
    wandb = None

log = logging.getLogger(__name__)

TIMES = frozenset({"seconds", "tokens_per_second", "mfu"})
"""Metrics that depend on the speed of the machine: two runs of the same command agree on all others."""


class MetricsFile:
    """`metrics.jsonl`: one line per step, each a JSON object.

    The constructor removes lines after `resumed_step` and an incomplete last line, so that a run that was killed and
    resumed has the same file as one that was not. While the disk is full, lines are kept in memory.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        self._pending = b""
        kept = b"".join(line for line in _complete_lines(path) if json.loads(line)["step"] <= resumed_step)
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_bytes(kept)
        temporary.rename(path)
        self._size = len(kept)

    def append(self, row: dict[str, Any]) -> None:
        self._pending += json.dumps(row).encode() + b"\n"
        self.flush()

    def flush(self) -> bool:
        """Write the pending lines; return False if the disk is full or returns another error."""
        try:
            with self.path.open("r+b") as file:
                file.seek(self._size)
                file.truncate()  # an incomplete line of an earlier attempt
                file.write(self._pending)
        except OSError as error:
            log.warning("%s could not be written: %s; its lines are kept in memory", self.path, error)
            return False
        self._size += len(self._pending)
        self._pending = b""
        return True

    def sync(self) -> None:
        """Flush the file to disk. Called before each checkpoint, so that a resumed run finds all lines up to its step.

        Raises:
            CannotSave: if the lines could not be written.
        """
        if not self.flush():
            raise CannotSave(errno.EIO, f"{self.path} could not be written")
        sync(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, without an incomplete last line."""
    return [json.loads(line) for line in _complete_lines(path)]


def _complete_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"\n") and line.startswith(b"{") and line.endswith(b"}\n")]


class Metrics:
    """Writes the metrics of a run to metrics.jsonl, TensorBoard and Weights & Biases."""

    def __init__(
        self, directory: Path, options: config.LoggingConfig, resumed_step: int, settings: dict[str, Any]
    ) -> None:
        self.file = MetricsFile(directory / "metrics.jsonl", resumed_step)
        self._board: SummaryWriter | None = None
        self._wandb: Any = None
        if options.tensorboard:
            try:
                self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_step + 1)
            except UnicodeEncodeError:
                log.warning("TensorBoard takes no directory whose name is not UTF-8; metrics are in metrics.jsonl only")
        if options.wandb:
            self._wandb = start_wandb(directory, options.wandb, settings)

    def write(self, row: dict[str, Any]) -> None:
        """Write the metrics of one step, {name: number} including `step`."""
        self.file.append(row)
        if self._board is not None:
            try:
                for name, value in row.items():
                    if name != "step":
                        self._board.add_scalar(name, value, row["step"])
            except OSError as error:
                log.warning(
                    "TensorBoard events could not be written: %s; metrics are written to metrics.jsonl only", error
                )
                self._board = None
        if self._wandb is not None:
            self._wandb.log(row, step=row["step"])

    def close(self) -> None:
        self.file.flush()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_wandb(options: config.LoggingConfig) -> None:
    """Check that Weights & Biases is installed if the run logs to it.

    Raises:
        ValueError: if it is not.
    """
    if options.wandb is not None and wandb is None:
        raise ValueError(
            f"logging.wandb {options.wandb!r} needs the package wandb, which is not installed: "
            "pip install 'sightline[wandb]'"
        )


def start_wandb(directory: Path, project: str, settings: dict[str, Any]) -> Any:
    """Start a Weights & Biases run, or resume the one whose id is stored in the run directory."""
    id_file = directory / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex[:8])
    return wandb.init(
        project=project,
        name=directory.name,
        id=id_file.read_text(),
        resume="allow",
        dir=str(directory),
        config=settings,
    )
