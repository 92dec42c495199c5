"""The soak: one run after another until enough faults were injected, and the table of their results."""

from __future__ import annotations

import itertools
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.soak.faults import Faults
from tests.soak.record import KINDS, NON_FINITE
from tests.soak.runs import CannotComplete, Comparison, Setting, SoakRun, compare, write_documents

FAULTS_PER_RUN = 4
MAX_WRONG = 10
"""Wrong runs after which the soak ends early."""
TORCHRUN_EVERY = 5
"""Every n-th run is started by torchrun, if it has several processes; the others by a fork server, which is faster."""


@dataclass
class Result:
    """One run of the soak after its faults."""

    faults: list[str]
    restarts: list[int]
    """Restarts after each fault and before the next one."""
    comparison: Comparison | None
    """Differences from the reference; None if the run could not be completed."""
    problems: list[str]

    @property
    def good(self) -> bool:
        return not self.problems and self.comparison is not None and self.comparison.equal


class Soak:
    """Runs below `output`, with kinds, moments and settings drawn from `seed`."""

    def __init__(self, output: Path, processes: Sequence[int], seed: int = 0) -> None:
        self.output, self.draw = output, random.Random(seed)
        self.source = write_documents(output / "documents")
        self.worlds = itertools.cycle(processes)
        self.references: dict[tuple[int, str, int], SoakRun] = {}
        self.results: list[Result] = []

    def inject(self, faults: int, kinds: Sequence[str]) -> None:
        """Inject this number of faults, all kinds equally often. Stops early if many runs are wrong."""
        waiting = list(itertools.islice(itertools.cycle(kinds), faults))
        self.draw.shuffle(waiting)
        while waiting and not self.gives_up():
            self.disturb(len(self.results) + 1, waiting)

    def gives_up(self) -> bool:
        """Return whether many runs are wrong, or the last runs have allowed no fault."""
        wrong = sum(not result.good for result in self.results)
        return wrong == MAX_WRONG or (len(self.results) >= 3 and not any(result.faults for result in self.results[-3:]))

    def disturb(self, number: int, waiting: list[str]) -> None:
        """Train one run under faults from `waiting`, and compare it with its reference."""
        begin, setting = time.monotonic(), self.draw_setting(number)
        print(f"run {number}: {setting.describe()}", flush=True)
        run = SoakRun(self.output / f"run-{number}", setting, self.source)
        faults = Faults(run, random.Random(self.draw.random()))
        comparison, problems = None, []
        try:
            while len(run.injected) < FAULTS_PER_RUN and self.inject_next(waiting, faults, run):
                injected = sum(len(result.faults) for result in self.results) + len(run.injected)
                print(f"  fault {injected}: {run.injected[-1].kind} after step {run.injected[-1].step}", flush=True)
            run.complete()
            comparison = compare(run, self.reference(setting, run.non_finite_step))
        except (CannotComplete, ValueError) as error:
            problems.append(str(error))
        finally:
            run.job.kill()
        before = [*(fault.restarts for fault in run.injected), run.restarts()]
        restarts = [stop - start for start, stop in itertools.pairwise(before)]
        kinds = [fault.kind for fault in run.injected]
        result = Result(kinds, restarts, comparison, problems + find_problems(run))
        self.results.append(result)
        state = "equal to its reference" if result.good else f"WRONG, see {run.log}: {result}"
        print(f"  {state}, {sum(restarts)} restarts, {time.monotonic() - begin:.0f} s", flush=True)
        if result.good:
            shutil.rmtree(run.directory.parent)

    def draw_setting(self, number: int) -> Setting:
        world = next(self.worlds)
        return Setting(
            world,
            packing=self.draw.choice(["stream", "best_fit"]),
            every=self.draw.randint(1, 3),
            asynchronous=self.draw.random() < 0.5,
            torchrun=world > 1 and number % TORCHRUN_EVERY == 0,
        )

    def inject_next(self, waiting: list[str], faults: Faults, run: SoakRun) -> bool:
        """Inject the first fault that the run allows, and remove it from `waiting`. Return False if there is none."""
        # At most one non-finite loss in a run, since each needs a reference.
        allowed = [kind for kind in waiting if kind != NON_FINITE or not run.non_finite_step]
        if not allowed or not faults.inject(allowed[0]):
            return False
        waiting.remove(allowed[0])
        return True

    def reference(self, setting: Setting, non_finite_step: int) -> SoakRun:
        """Return a run on the same mesh without faults, but with a non-finite loss in this step if it is above 0."""
        key = (setting.world, setting.packing, non_finite_step)
        if key not in self.references:
            directory = self.output / "reference-{}-{}-{}".format(*key)
            run = SoakRun(directory, Setting(setting.world, setting.packing, every=2), self.source)
            if non_finite_step:
                assert Faults(run, self.draw).make_non_finite(non_finite_step, rank=0)
            run.complete()
            self.references[key] = run
        return self.references[key]


def find_problems(run: SoakRun) -> list[str]:
    """Return what was wrong in the course of the run, whatever its results are."""
    problems = [run.job.late] if run.job.late else []
    restarts, faults = run.restarts(), len(run.injected)
    if restarts > faults:
        problems.append(f"{faults} faults took {restarts} restarts; expected at most one for each")
    if run.non_finite_step and f"step {run.non_finite_step}: loss" not in run.log.read_text():
        problems.append(f"the non-finite loss of step {run.non_finite_step} was not reported")
    unnoticed = [name for name in sorted(run.damaged) if not list(run.checkpoints.glob(f"{name}.damaged*"))]
    if unnoticed:
        problems.append(f"the damage of {', '.join(unnoticed)} was not noticed")
    return problems


def table(results: Sequence[Result]) -> str:
    """Return a line per kind of fault. A run that differs from its reference counts for each of its faults."""
    lines = [
        "| fault | injected | restarts | documents lost | documents repeated | losses equal | all right |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in (*KINDS, "all"):
        hit = [(result, i) for result in results for i, fault in enumerate(result.faults) if kind in (fault, "all")]
        if not hit:
            continue
        differences = {id(result): result.comparison for result, _ in hit}.values()
        lost, repeated = (
            sum(getattr(difference, name) for difference in differences if difference) for name in ("lost", "repeated")
        )
        restarts = sum(result.restarts[i] for result, i in hit)
        equal = sum(bool(result.comparison and result.comparison.losses_equal) for result, _ in hit)
        right = sum(result.good for result, _ in hit)
        lines.append(f"| {kind} | {len(hit)} | {restarts} | {lost} | {repeated} | {equal} | {right} |")
    return "\n".join(lines)
