"""metrics.jsonl, TensorBoard and Weights & Biases: one row of numbers each optimizer step."""

from __future__ import annotations

import errno
import json
import logging
import uuid
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from sightline import config
from sightline.training.checkpoint import CannotSave, sync

try:
    import wandb
except ImportError:
    wandb = None

log = logging.getLogger(__name__)

TIMES = frozenset({"seconds", "tokens_per_second", "mfu"})
"""The numbers that tell how fast a step was: two runs of one command agree on all others."""


class MetricsFile:
    """`metrics.jsonl`: one JSON object a line, one line a step.

    It begins by dropping the lines after `resumed_step`, and a line that a kill cut in half, so that the file ends up
    as that of a run that was never killed. Where the disk is full, lines wait in memory until it takes them.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        self._waiting = b""
        kept = b"".join(line for line in _whole_lines(path) if json.loads(line)["step"] <= resumed_step)
        aside = path.with_name(f".{path.name}.partial")
        aside.write_bytes(kept)
        aside.rename(path)
        self._size = len(kept)

    def append(self, row: dict[str, Any]) -> None:
        self._waiting += json.dumps(row).encode() + b"\n"
        self.flush()

    def flush(self) -> bool:
        """Write what waits; False when the disk does not take it."""
        try:
            with self.path.open("r+b") as file:
                file.seek(self._size)
                file.truncate()  # what an earlier attempt wrote of a line
                file.write(self._waiting)
        except OSError as error:
            log.warning("%s could not be written: %s; its lines wait in memory", self.path, error)
            return False
        self._size += len(self._waiting)
        self._waiting = b""
        return True

    def sync(self) -> None:
        """On the disk before a checkpoint is: a resumed run must find every line up to its step. Errors: CannotSave."""
        if not self.flush():
            raise CannotSave(errno.EIO, f"{self.path} could not be written")
        sync(self.path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a last line cut in half."""
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"\n") and line.startswith(b"{") and line.endswith(b"}\n")]


class Metrics:
    """A run's numbers, to every place that wants them."""

    def __init__(
        self, directory: Path, options: config.LoggingConfig, resumed_step: int, settings: dict[str, Any]
    ) -> None:
        self.file = MetricsFile(directory / "metrics.jsonl", resumed_step)
        self._board: SummaryWriter | None = None
        self._wandb: Any = None
        if options.tensorboard:
            self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=resumed_step + 1)
        if options.wandb:
            self._wandb = start_wandb(directory, options.wandb, settings)

    def write(self, row: dict[str, Any]) -> None:
        """Note one step: `row` maps names to numbers, `step` among them."""
        self.file.append(row)
        if self._board is not None:
            try:
                for name, value in row.items():
                    if name != "step":
                        self._board.add_scalar(name, value, row["step"])
            except OSError as error:
                log.warning("TensorBoard events could not be written: %s; metrics.jsonl goes on alone", error)
                self._board = None
        if self._wandb is not None:
            self._wandb.log(row, step=row["step"])

    def close(self) -> None:
        self.file.flush()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def start_wandb(directory: Path, project: str, settings: dict[str, Any]) -> Any:
    """A Weights & Biases run that a resumed run goes on with: its id is kept in the run directory."""
    if wandb is None:
        raise ValueError(
            f"logging.wandb {project!r} needs the package wandb, which is not installed: pip install 'sightline[wandb]'"
        )
    kept = directory / "wandb_id"
    if not kept.exists():
        kept.write_text(uuid.uuid4().hex[:8])
    return wandb.init(
        project=project, name=directory.name, id=kept.read_text(), resume="allow", dir=str(directory), config=settings
    )
