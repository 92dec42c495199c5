"""Save checkpoints during a run, synchronously or asynchronously, and handle failures."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sightline import config
from sightline.errors import SaveFailed
from sightline.parallel.host import HostGroup
from sightline.parallel.mesh import Mesh
from sightline.training.checkpoint import CannotSave, LocalState, Progress, local_state, on_rank_zero, save_checkpoint
from sightline.training.checkpoint_directory import find_latest, step_of


class Saver:
    """Writes the checkpoints of a run to `directory`, one at a time. All ranks make the same calls.

    With `options.asynchronous` this rank's shards are copied to CPU memory, which must hold a second copy of the local
    weights and optimizer state, and are written by a thread during the next steps.

    warn  logs a warning if a checkpoint could not be written
    """

    def __init__(
        self,
        directory: Path,
        run_files: list[Path],
        options: config.CheckpointConfig,
        warn: Callable[[str], None],
        mesh: Mesh | None = None,
    ) -> None:
        self.directory, self.run_files, self.options, self.warn, self.mesh = directory, run_files, options, warn, mesh
        self.host = HostGroup(for_thread=options.asynchronous)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sightline-saver")
        self._pending: Future[None] | None = None
        latest = self.host.from_rank_zero(self.latest)  # other ranks may see an old listing of a network file system
        self.newest_step = step_of(latest) if latest else 0
        """Step of the newest complete checkpoint."""
        self.last_started = self.newest_step
        """Step of the last save that was started."""
        self.before_save: Callable[[], None] = lambda: None
        """Called on rank 0 before each save, to flush files that a checkpoint depends on."""
        self.verified: Path | None = None
        """Newest checkpoint whose contents a start has verified: kept until a later start verifies another."""

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint, or None."""
        return find_latest(self.directory)

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step`; the last one is written by `save_last`."""
        return self.options.every > 0 and step % self.options.every == 0

    def save(self, state: dict[str, Any], progress: Progress) -> None:
        """Start to save a checkpoint, unless one of that step exists. A failure is logged as a warning."""
        self._warn_on_error(self.wait)
        if self.newest_step != progress.step:
            self._warn_on_error(lambda: self.start(state, progress))

    def save_last(self, state: dict[str, Any], progress: Progress) -> None:
        """Save a checkpoint and wait for it, unless one of that step exists.

        Raises:
            SaveFailed: on every rank, if one of them cannot write.
        """
        self._warn_on_error(self.wait)
        if self.newest_step == progress.step:
            return
        try:
            self.start(state, progress)
            self.wait()
        except CannotSave as error:
            raise SaveFailed(progress.step, str(error), self.latest()) from error

    def check(self) -> None:
        """Log a warning if an asynchronous save has failed."""
        if self._pending is not None and self._pending.done():
            self._warn_on_error(self.wait)

    def start(self, state: dict[str, Any], progress: Progress) -> None:
        """Save a checkpoint of `tensors(...)`, or start to save it asynchronously.

        Raises:
            CannotSave: on every rank, if it cannot be written. `wait` raises the errors of an asynchronous save.
        """
        self.wait()
        self.last_started = progress.step
        on_rank_zero(self.host, self.before_save)
        local = local_state(state, progress, self.mesh)
        if self.options.asynchronous:
            self._pending = self._thread.submit(self._write, local.copied())
        else:
            self._write(local)

    def wait(self) -> None:
        """Wait for an asynchronous save.

        Raises:
            CannotSave: on every rank, if it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for an asynchronous save and stop the thread."""
        self._thread.shutdown()

    def _write(self, local: LocalState) -> None:
        keep, verified = self.options.keep, self.verified
        save_checkpoint(self.directory, local, self.run_files, keep=keep, verified=verified, host=self.host)
        self.newest_step = local.step

    def _warn_on_error(self, save: Callable[[], None]) -> None:
        try:
            save()
        except CannotSave as error:
            latest = self.latest()
            self.warn(
                f"the checkpoint of step {self.last_started} could not be written: {error}. The run continues; "
                + (f"{latest} is intact" if latest else "there is no earlier checkpoint")
            )
