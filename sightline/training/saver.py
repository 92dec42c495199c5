"""When checkpoints are written: while the run waits, or beside its next steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from sightline.training.checkpoint import Progress, find_latest, on_all_processes, save_checkpoint, step_of


class Saver:
    """Writes the checkpoints of a run into `directory`, one after the other. All processes call it alike.

    asynchronous  copy the tensors to the CPU's memory and write them in a thread, while the run goes on. Memory for a
                  second copy of this process's weights and moments is needed meanwhile.
    """

    def __init__(self, directory: Path, run_files: list[Path], *, keep: int, asynchronous: bool) -> None:
        self.directory, self.run_files, self.keep, self.asynchronous = directory, run_files, keep, asynchronous
        # A group of its own, so that the thread's messages never meet those of a step; gloo, so that they need no GPU.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sightline-saver")
        self._pending: Future[None] | None = None
        latest = find_latest(directory)
        self.newest = step_of(latest) if latest else 0
        """Step of the newest checkpoint that is whole."""
        self.begun = self.newest
        """Step of the one that was begun last."""

    def save(self, state: dict[str, Any], progress: Progress, before: Callable[[], None] = lambda: None) -> None:
        """Write a checkpoint of `tensors(...)`, or begin to.

        before  brings to the disk what must be there first

        Errors: CannotSave on every process, for this one. One that was begun is told by `check` or `wait`.
        """
        self.wait()
        self.begun = progress.step
        with on_all_processes(self.group):
            before()
        if self.asynchronous:
            self._pending = self._thread.submit(self._write, BlockingAsyncStager().stage(state), progress)
        else:
            self._write(state, progress)

    def check(self) -> None:
        """Whether the one that was begun has failed by now. Errors: CannotSave."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until the one that was begun is whole. Errors: CannotSave on every process."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let the one that was begun become whole."""
        self._thread.shutdown()

    def _write(self, state: dict[str, Any], progress: Progress) -> None:
        save_checkpoint(self.directory, state, progress, self.run_files, keep=self.keep, group=self.group)
        self.newest = progress.step
