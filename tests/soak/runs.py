"""One run of the soak: started, disturbed by faults, restarted until it is complete, and compared with a reference."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from tests.soak.jobs import TIMEOUT, ForkedJob, Launch, TorchrunJob
from tests.soak.record import Record
from tests.support.small_runs import WORDS, rows_of, weights_of

STEPS = 24
START_SECONDS = 60.0
"""Limit for the start of a job on a busy machine."""


SPARE_RESTARTS = 3
"""Restarts without a fault after which a run is given up."""


class CannotComplete(Exception):
    """The run hangs, or fails again and again."""


@dataclass(frozen=True)
class Setting:
    """Settings of a run. Runs with equal `world` and `packing` have equal results."""

    world: int
    packing: str = "stream"
    every: int = 1
    asynchronous: bool = False
    torchrun: bool = False

    def arguments(self, directory: Path, source: Path) -> list[str]:
        """Return the training command. Four processes are shard 2 x tensor 2."""
        return [
            "train", "llama3-debug", "--output-dir", str(directory), "--data.source", str(source),
            "--data.cache-dir", str(directory.with_name("cache")), "--data.packing", self.packing,
            "--data.validation-fraction", "0.1",
            "--model.hidden-size", "32", "--model.vocab-size", "320", "--training.steps", str(STEPS),
            "--training.sequence-length", "64", "--training.global-batch-size", "4", "--training.micro-batch-size", "1",
            "--training.device", "cpu", "--optimizer.warmup-steps", "2", "--validation.every", "8",
            "--validation.rows", "4", "--checkpoint.every", str(self.every),
            "--checkpoint.asynchronous" if self.asynchronous else "--checkpoint.no-asynchronous",
            "--logging.sample-tokens", "0", "--logging.no-tensorboard", "--parallel.timeout", str(TIMEOUT),
            "--parallel.tensor", str(max(1, self.world // 2)),
        ]  # fmt: skip

    def describe(self) -> str:
        form = "torchrun, " if self.torchrun else ""
        save = "asynchronously " if self.asynchronous else ""
        return f"{self.world} processes, {form}{self.packing}, saved {save}every {self.every} steps"


def write_documents(directory: Path) -> Path:
    """Write sixty documents of 3 to 60 words. Every word has the number of its document: no two parts are equal."""
    draw, words = random.Random(0), WORDS.split()
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(60):
        text = " ".join(f"{draw.choice(words)}{number}" for _ in range(draw.randint(3, 60)))
        (directory / f"{number}.txt").write_text(text)
    return directory


class Fault(NamedTuple):
    """An injected fault: its kind, and the last step and the number of restarts before it."""

    kind: str
    step: int
    restarts: int


class SoakRun:
    """A run in `directory`, which `wait` restarts as often as it fails, like a scheduler."""

    def __init__(self, directory: Path, setting: Setting, source: Path) -> None:
        self.setting = setting
        self.directory = directory / "run"
        self.checkpoints = self.directory / "checkpoints"
        self.log = directory / "log"
        shutil.rmtree(directory, ignore_errors=True)
        (directory / "record").mkdir(parents=True)
        self.record = Record(directory / "record")
        launch = Launch(setting.arguments(self.directory, source), setting.world, self.record.directory, self.log)
        self.job = TorchrunJob(launch) if setting.torchrun else ForkedJob(launch)
        self.injected: list[Fault] = []
        self.damaged: set[str] = set()
        """Names of the checkpoints that were damaged."""
        self.non_finite_step = 0
        """Step with an injected non-finite loss, 0 if there is none."""
        self.job.start()

    def wait(self, condition: Callable[[], bool], seconds: float = START_SECONDS) -> bool:
        """Wait until the condition is true, and restart the job if it has failed. Return False if the run is complete.

        seconds  limit of the time without any progress

        Raises:
            CannotComplete: if there is no progress, or the job fails more often than faults explain.
        """
        progress, since = self.progress(), time.monotonic()
        while not condition():
            code = self.job.returncode()
            if code == 0:
                return False
            if code is not None:
                self.job.start()
            if self.restarts() > len(self.injected) + SPARE_RESTARTS:
                raise CannotComplete(f"{self.restarts()} restarts after {len(self.injected)} faults")
            if self.progress() != progress:
                progress, since = self.progress(), time.monotonic()
            if time.monotonic() > since + seconds:
                raise CannotComplete(f"no progress within {seconds:.0f} s, after {progress}")
            time.sleep(0.005)
        return True

    def progress(self) -> tuple[int, int]:
        """Return how many processes have been rank 0, and how many steps the last of them has finished."""
        attempts = len(self.record.attempts())
        return attempts, len(self.record.steps(attempts - 1)) if attempts else 0

    def restarts(self) -> int:
        """Return the number of processes that have been rank 0 after the first one."""
        return max(self.progress()[0] - 1, 0)

    def step(self) -> int:
        """Return the number of the last step that the current process of rank 0 has finished, 0 before."""
        return max(self.record.steps(self.progress()[0] - 1), default=0)

    def complete(self) -> None:
        """Wait until the run is complete. Raises like `wait`."""
        self.wait(lambda: False)


@dataclass
class Comparison:
    """Differences between a run and its reference."""

    lost: int
    """Parts of documents that the final weights were not trained on although those of the reference were."""
    repeated: int
    losses_equal: bool
    """All losses, gradient norms and counts in metrics.jsonl are equal to the bit."""
    weights_equal: bool

    @property
    def equal(self) -> bool:
        return not self.lost and not self.repeated and self.losses_equal and self.weights_equal


def compare(run: SoakRun, reference: SoakRun) -> Comparison:
    """Compare step by step."""
    world = run.setting.world
    documents, expected = run.record.surviving_documents(world), reference.record.surviving_documents(world)
    weights, expected_weights = weights_of(run.directory), weights_of(reference.directory)
    return Comparison(
        lost=count_missing(expected, documents),
        repeated=count_missing(documents, expected),
        losses_equal=rows_of(run.directory) == rows_of(reference.directory),
        weights_equal=all(torch.equal(weight, expected_weights[name]) for name, weight in weights.items()),
    )


def count_missing(documents: dict[int, Counter[str]], found: dict[int, Counter[str]]) -> int:
    """Return how many parts of `documents` are not found in the same step."""
    return sum((parts - found.get(step, Counter())).total() for step, parts in documents.items())
