"""How a run can end before its last step, and the exit code of each end. Loads nothing but Python's own library.

What the user asked and cannot be is a ValueError: nothing was begun, nothing is lost.
"""

from __future__ import annotations

import signal
from pathlib import Path


class RunEnded(Exception):
    """A run that left before its last step. `exit_code` is what the command line returns."""

    exit_code = 1


class Stopped(RunEnded):
    """A signal asked the run to leave; it finished its step and saved."""

    def __init__(self, signum: int, step: int, checkpoint: Path | None) -> None:
        self.exit_code = 128 + signum
        name = signal.Signals(signum).name
        super().__init__(
            f"stopped by {name} after step {step}; saved in {checkpoint}. The same command continues from there."
        )


class RunFailed(RunEnded):
    """The run cannot go on."""


class NonFiniteLoss(RunFailed):
    """Loss or gradient norm is no number any more. The weights were not updated by that step."""

    def __init__(self, step: int, loss: float, grad_norm: float, checkpoint: Path | None) -> None:
        self.step, self.loss, self.grad_norm, self.checkpoint = step, loss, grad_norm, checkpoint
        kept = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; expected finite numbers. The step did not touch the "
            f"weights, and {kept}. The same command would come to the same step: lower --optimizer.learning-rate or "
            "--optimizer.max-grad-norm, or lengthen --optimizer.warmup-steps"
            + (", then continue." if checkpoint else ", then start again.")
        )


class SaveFailed(RunFailed):
    """The last checkpoint of a run could not be written."""

    def __init__(self, step: int, reason: str, checkpoint: Path | None) -> None:
        kept = f"{checkpoint} is intact" if checkpoint else "there is no earlier checkpoint"
        super().__init__(
            f"the checkpoint of step {step} could not be written: {reason}; {kept}. "
            "Make room on the disk and run the same command again: it continues from the newest checkpoint."
        )


class LostRank(RuntimeError):
    """Other processes waited for one that did not come. The text names it."""


class AnotherRankEnded(Exception):
    """Another process ended the job and says why; this one leaves with `exit_code` and says nothing."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


def exit_code_of(error: BaseException) -> int:
    """Of a command that ends with this error: what the error says of itself, 2 for what the user asked, else 1."""
    return getattr(error, "exit_code", 2 if isinstance(error, ValueError) else 1)
