"""When checkpoints are written: while the run waits, or beside its next steps; and what becomes of one that fails."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from sightline import config
from sightline.errors import SaveFailed
from sightline.training.checkpoint import (
    CannotSave,
    Progress,
    find_latest,
    on_all_processes,
    save_checkpoint,
    step_of,
)


class Saver:
    """Writes the checkpoints of a run into `directory`, one after the other. All processes call it alike.

    With `options.asynchronous` the tensors are copied to the CPU's memory, which must hold a second copy of this
    process's weights and moments, and written in a thread while the run goes on. `warn` takes what to say of a
    checkpoint that could not be written.
    """

    def __init__(
        self, directory: Path, run_files: list[Path], options: config.CheckpointConfig, warn: Callable[[str], None]
    ) -> None:
        self.directory, self.run_files, self.options, self.warn = directory, run_files, options, warn
        # A group of its own, so that the thread's messages never meet those of a step; gloo, so that they need no GPU.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sightline-saver")
        self._pending: Future[None] | None = None
        latest = self.latest()
        self.newest = step_of(latest) if latest else 0
        """Step of the newest checkpoint that is whole."""
        self.begun = self.newest
        """Step of the one that was begun last."""
        self.before: Callable[[], None] = lambda: None
        """Brings to the disk what must be there before a checkpoint is."""

    def latest(self) -> Path | None:
        """The newest checkpoint that is whole."""
        return find_latest(self.directory)

    def is_due(self, step: int) -> bool:
        """Whether one is due after `step`; the one at the end comes by itself."""
        return self.options.every > 0 and step % self.options.every == 0

    def save(self, state: dict[str, Any], progress: Progress) -> None:
        """`begin` a checkpoint, unless there is one of that step; a disk that does not take it is a warning."""
        self._warn_of(self.wait)
        if self.newest != progress.step:
            self._warn_of(lambda: self.begin(state, progress))

    def save_last(self, state: dict[str, Any], progress: Progress) -> None:
        """Write a checkpoint, unless there is one of that step. Raises: SaveFailed on every process."""
        self._warn_of(self.wait)
        if self.newest == progress.step:
            return
        try:
            self.begin(state, progress)
            self.wait()
        except CannotSave as error:
            raise SaveFailed(progress.step, str(error), self.latest()) from error

    def check(self) -> None:
        """Warn where the one that was begun has failed by now."""
        if self._pending is not None and self._pending.done():
            self._warn_of(self.wait)

    def begin(self, state: dict[str, Any], progress: Progress) -> None:
        """Write a checkpoint of `tensors(...)`, or begin to.

        Errors: CannotSave on every process, for this one. One that was begun is told by `wait`.
        """
        self.wait()
        self.begun = progress.step
        with on_all_processes(self.group):
            self.before()
        if self.options.asynchronous:
            self._pending = self._thread.submit(self._write, BlockingAsyncStager().stage(state), progress)
        else:
            self._write(state, progress)

    def wait(self) -> None:
        """Until the one that was begun is whole. Errors: CannotSave on every process."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let the one that was begun become whole."""
        self._thread.shutdown()

    def _write(self, state: dict[str, Any], progress: Progress) -> None:
        save_checkpoint(self.directory, state, progress, self.run_files, keep=self.options.keep, group=self.group)
        self.newest = progress.step

    def _warn_of(self, save: Callable[[], None]) -> None:
        try:
            save()
        except CannotSave as error:
            latest = self.latest()
            self.warn(
                f"the checkpoint of step {self.begun} could not be written: {error}. The run goes on; "
                + (f"{latest} is intact" if latest else "there is no earlier checkpoint")
            )
