"""Errors that end a run before its last step, with their exit codes. Imports only the standard library.

Invalid options and inputs raise ValueError instead, before training starts.
"""

from __future__ import annotations

import signal
from pathlib import Path


class RunEnded(Exception):
    """The run ended before its last step; the command line exits with `exit_code`."""

    exit_code = 1


class Stopped(RunEnded):
    """The run stopped on a signal, after it finished the current step and saved a checkpoint."""

    def __init__(self, signum: int, step: int, checkpoint: Path | None) -> None:
        self.exit_code = 128 + signum
        name = signal.Signals(signum).name
        super().__init__(
            f"stopped by {name} after step {step}; saved in {checkpoint}. The same command continues from there."
        )


class RunFailed(RunEnded):
    """The run cannot continue."""


class NonFiniteLoss(RunFailed):
    """Loss or gradient norm is NaN or infinite. That step did not update the weights."""

    def __init__(self, step: int, loss: float, grad_norm: float, checkpoint: Path | None) -> None:
        self.step, self.loss, self.grad_norm, self.checkpoint = step, loss, grad_norm, checkpoint
        saved = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; expected finite numbers. The step did not "
            f"update the weights, and {saved}. The same command would fail in the same step: reduce "
            "--optimizer.learning-rate or --optimizer.max-grad-norm, or increase --optimizer.warmup-steps, then "
            + ("continue." if checkpoint else "start again.")
        )


class SaveFailed(RunFailed):
    """The last checkpoint of the run could not be written."""

    def __init__(self, step: int, reason: str, checkpoint: Path | None) -> None:
        saved = f"{checkpoint} is intact" if checkpoint else "there is no earlier checkpoint"
        super().__init__(
            f"the checkpoint of step {step} could not be written: {reason}; {saved}. "
            "Free disk space and run the same command again: it continues from the newest checkpoint."
        )


class LostRank(RuntimeError):
    """Ranks timed out waiting for another rank, which the message names."""


class AnotherRankEnded(Exception):
    """Another rank ended the job and reports the error; this rank exits with `exit_code` and prints nothing."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of a command that fails with this error: its `exit_code`, or 2 for ValueError, or 1."""
    return getattr(error, "exit_code", 2 if isinstance(error, ValueError) else 1)
