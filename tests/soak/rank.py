"""One rank of a run of the soak: `sightline train`, which records the documents of each step and injects faults.

The environment variable SOAK_RECORD is the directory of the `Record`. Functions of the product are replaced from
outside: it has no code for faults.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from sightline.batch import PADDING, Batch
from sightline.cli import main as cli
from sightline.training import step as step_module
from sightline.training import trainer
from tests.soak.record import DISK_FULL, NON_FINITE, WORKER, Record

SMALLEST_FILE_LIMIT = 16 << 10
"""Bytes. The record and the log of a process, which the limit applies to as well, are smaller."""


class Rank:
    """Faults and the record of this process."""

    def __init__(self, record: Record, run_directory: Path) -> None:
        self.record, self.run_directory = record, run_directory
        self.rank = int(os.environ.get("RANK", "0"))
        self.file = os.open(record.directory / f"{time.time_ns()}-{self.rank}.jsonl", os.O_CREAT | os.O_WRONLY)
        self.step = 0
        self.documents: list[str] = []
        self.fault: dict[str, Any] = {}
        self.fails_to_open = False
        self.steps_until_space = 0

    def read_fault(self) -> None:
        """Read the fault of the driver, if it is for this rank and was not injected."""
        try:
            fault = json.loads(self.record.fault_file.read_text())
        except FileNotFoundError:
            return
        is_new = not self.record.fired_file(fault["number"], self.rank).exists()
        self.fault = fault if is_new and fault["rank"] in (self.rank, None) else {}

    def fire(self) -> None:
        self.record.fired_file(self.fault["number"], self.rank).touch()
        self.fault = {}

    def before_step(self, step: int) -> None:
        """Read the fault, and fill or empty the disk."""
        self.step = step
        self.read_fault()
        if self.steps_until_space:
            self.steps_until_space -= 1
            if not self.steps_until_space:
                self.fails_to_open = False
                self.limit_file_size(None)
        elif self.fault.get("kind") == DISK_FULL:
            self.steps_until_space = self.fault["steps"]
            self.fails_to_open = self.fault["bytes"] is None
            self.limit_file_size(self.fault["bytes"])
            self.fire()

    def limit_file_size(self, limit: int | None) -> None:
        """Make the kernel fail writes beyond the first `limit` bytes of a file, after a part of them was written."""
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        soft = hard if limit is None else max(limit, SMALLEST_FILE_LIMIT)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Audit hook: raise ENOSPC when a file below the run directory is opened for writing."""
        if event != "open" or not self.fails_to_open or not isinstance(arguments[0], str | os.PathLike):
            return
        path, writes = Path(arguments[0]), arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes and path.is_relative_to(self.run_directory):
            raise OSError(errno.ENOSPC, "No space left on device (injected)", str(path))

    def before_batch(self) -> None:
        """Raise an error if the background thread of the loader makes a batch."""
        if self.fault.get("kind") == WORKER and threading.current_thread() is not threading.main_thread():
            self.fire()
            raise RuntimeError("the data worker died (injected)")

    def before_clip(self, parameters: list[torch.nn.Parameter]) -> None:
        """Replace the local gradients by NaN."""
        if self.fault.get("kind") == NON_FINITE and self.fault["step"] == self.step:
            self.fire()
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(float("nan"))

    def after_step(self, step: int) -> None:
        line = json.dumps({"step": step, "documents": self.documents})
        os.write(self.file, line.encode() + b"\n")


def documents_of(batch: Batch) -> list[str]:
    """Return a digest of each document's part in each row: its first position and its tokens."""
    digests = []
    for tokens, ids, positions in zip(batch.tokens, batch.document_ids, batch.positions, strict=True):
        starts = [0, *(torch.nonzero(ids[1:] != ids[:-1]).flatten() + 1).tolist(), len(ids)]
        for start, stop in itertools.pairwise(starts):
            if ids[start] != PADDING:
                part = torch.cat([positions[start : start + 1].long(), tokens[start:stop].long()])
                digests.append(hashlib.sha256(part.numpy().tobytes()).hexdigest()[:12])
    return digests


def install(rank: Rank) -> None:
    """Call `rank` at each step, new batch, clipping of gradients and opening of a file."""
    launch_step, train_step = trainer.Trainer.launch_step, trainer.train_step
    check_batch, clip_gradients = Batch.__post_init__, step_module.clip_gradients

    def recorded_launch(self: trainer.Trainer, *arguments: Any) -> trainer.PendingStep:
        rank.before_step(self.step + 1)
        launched = launch_step(self, *arguments)
        rank.after_step(self.step)
        return launched

    def recorded_step(model: Any, optimizer: Any, batch: Batch, *rest: Any, **options: Any) -> step_module.StepResult:
        # One of the ranks that share rows records them.
        counts = all(model.mesh.index(axis) == 0 for axis in ("context", "tensor", "pipeline"))
        rank.documents = documents_of(batch) if counts else []
        return train_step(model, optimizer, batch, *rest, **options)

    def failing_batch(self: Batch) -> None:
        rank.before_batch()
        check_batch(self)

    def failing_clip(parameters: Any, *rest: Any) -> Any:
        listed = list(parameters)
        rank.before_clip(listed)
        return clip_gradients(listed, *rest)

    trainer.Trainer.launch_step, trainer.train_step = recorded_launch, recorded_step
    Batch.__post_init__, step_module.clip_gradients = failing_batch, failing_clip
    sys.addaudithook(rank.on_event)


def main() -> None:
    """Run the command in `sys.argv`."""
    directory = Path(sys.argv[sys.argv.index("--output-dir") + 1])
    install(Rank(Record(Path(os.environ["SOAK_RECORD"])), directory))
    cli.main()


def start_forked(environment: dict[str, str], arguments: list[str], log: Path) -> None:
    """Run the command in a process of a fork server, which has imported everything."""
    os.environ |= environment
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, sys.stdout.fileno())
    os.dup2(descriptor, sys.stderr.fileno())
    sys.argv = ["sightline", *arguments]
    main()


if __name__ == "__main__":
    main()
