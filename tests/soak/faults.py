"""Inject faults into a run of the soak, each at a random moment."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from sightline.training.checkpoint_directory import list_checkpoints
from tests.soak.jobs import LATEST_END
from tests.soak.record import CUT, DISK_FULL, FLIP, KILL, NON_FINITE, STOP, TERM
from tests.soak.runs import START_SECONDS, STEPS, Fault, SoakRun

NON_FINITE_STEPS = range(4, STEPS, 4)
"""Steps with a non-finite loss: few, because each needs a reference in which the same step has one."""
SIGNALS = {KILL: signal.SIGKILL, TERM: signal.SIGTERM, STOP: signal.SIGSTOP}
TORCHRUN_END = 30.0
"""Seconds after which torchrun kills a rank that does not react to SIGTERM."""


class Faults:
    """Injects faults into one run, at moments drawn from `draw`."""

    def __init__(self, run: SoakRun, draw: random.Random) -> None:
        self.run, self.draw = run, draw
        self.world = run.setting.world

    def inject(self, kind: str) -> bool:
        """Inject a fault and wait until the job reacts. Return False if the run was complete before.

        Raises:
            CannotComplete: if the job does not react.
        """
        if not self.wait_for_moment():
            return False
        attempts, step, restarts = self.run.progress()[0], self.run.step(), self.run.restarts()
        if kind in SIGNALS:
            injected = self.send_signal(kind)
        elif kind in (CUT, FLIP):
            injected = self.damage_newest_checkpoint(kind)
        elif kind == DISK_FULL:
            size = self.draw.choice([None, int(2 ** self.draw.uniform(14, 17))])
            injected = self.ask_ranks(kind, rank=None, steps=self.draw.randint(3, 10), bytes=size)
        elif kind == NON_FINITE:
            steps = [step for step in NON_FINITE_STEPS if step > self.run.step() + 1]
            injected = bool(steps) and self.make_non_finite(steps[0], rank=self.draw.randrange(self.world))
        else:
            injected = self.ask_ranks(kind, rank=self.draw.randrange(self.world))
        if injected:
            self.run.injected.append(Fault(kind, step, restarts))
            self.wait_for_reaction(kind, attempts)
        return injected

    def wait_for_reaction(self, kind: str, attempts: int) -> None:
        """Wait until the job has restarted, if the fault ends it. `attempts` is their number before the fault."""
        if kind == DISK_FULL or (kind == STOP and self.world == 1):
            return  # the run may continue
        seconds = START_SECONDS
        if kind == STOP:
            other = ((self.run.job.stopped or 0) + 1) % self.world
            if not self.run.wait(lambda: self.run.job.pid(other) is None, LATEST_END):
                return
            seconds += TORCHRUN_END
        self.run.wait(lambda: self.run.progress()[0] > attempts, seconds)

    def wait_for_moment(self) -> bool:
        """Wait for a random moment, at the start or in a later step. Return False if the run is complete before."""
        run, (attempts, steps) = self.run, self.run.progress()
        if self.draw.random() < 0.2:
            time.sleep(self.draw.uniform(0, 2))
            return run.wait(lambda: True)
        moment = (max(attempts, 1), steps + self.draw.randint(1, 6))
        if not run.wait(lambda: run.progress() >= moment):
            return False
        time.sleep(self.draw.uniform(0, 0.2))
        return True

    def send_signal(self, kind: str) -> bool:
        """Send a signal to a random rank. A single process that is stopped continues after a moment."""
        job, rank = self.run.job, self.draw.randrange(self.world)
        if not self.run.wait(lambda: job.pid(rank) is not None):
            return False
        pid = job.pid(rank)
        if pid is None:
            return False
        try:
            os.kill(pid, SIGNALS[kind])
        except ProcessLookupError:
            return False
        if kind == STOP and self.world > 1:
            job.stopped = rank
        elif kind == STOP:
            time.sleep(self.draw.uniform(0, 1))
            os.kill(pid, signal.SIGCONT)
        return True

    def damage_newest_checkpoint(self, kind: str) -> bool:
        """Kill the job, and damage a random file of its newest checkpoint as soon as there are two."""
        if not self.run.wait(lambda: len(list_checkpoints(self.run.checkpoints)) > 1):
            return False
        self.run.job.kill()
        if self.run.job.returncode() == 0:
            return False
        newest = list_checkpoints(self.run.checkpoints)[-1]
        damage(self.draw.choice(sorted(newest.iterdir())), kind, self.draw)
        self.run.damaged.add(newest.name)
        return True

    def make_non_finite(self, step: int, rank: int) -> bool:
        """Make the gradients of this step NaN on one rank."""
        if not self.ask_ranks(NON_FINITE, rank=rank, step=step):
            return False
        self.run.non_finite_step = step
        return True

    def ask_ranks(self, kind: str, **options: Any) -> bool:
        """Ask the ranks to inject a fault, and wait until one has done so."""
        number = len(self.run.injected) + 1
        self.run.record.write_fault(number=number, kind=kind, **options)
        return self.run.wait(lambda: self.run.record.has_fired(number))


def damage(file: Path, kind: str, draw: random.Random) -> None:
    """Cut a file at a random size, or flip a random bit of it."""
    size = file.stat().st_size
    with file.open("r+b") as opened:
        if kind == CUT:
            opened.truncate(draw.randrange(size))
            return
        position = draw.randrange(size)
        opened.seek(position)
        (byte,) = opened.read(1)
        opened.seek(position)
        opened.write(bytes([byte ^ 1 << draw.randrange(8)]))
