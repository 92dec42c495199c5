"""Device, clock and records of one part of the measurements."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

MEASURE_SECONDS = 1.5  # of all contestants that take turns
MAX_ROUNDS = 20
MIN_ROUNDS = 3
MAX_MESSAGE = 300
QUEUE_CYCLES = 10_000_000  # about 5 ms


class Bench:
    """Runs on the GPU in bfloat16, or for `smoke` on the CPU in float32 and small sizes.

    file     JSON lines: a measurement is written when it is made, so that it survives a crash of a later one
    seconds  time that the part may take, checked before each measurement
    """

    def __init__(self, file: Path, seconds: float, *, smoke: bool) -> None:
        self.file, self.smoke = file, smoke
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds
        self.device = torch.device("cpu" if smoke else "cuda")
        self.dtype = torch.float32 if smoke else torch.bfloat16

    def record(self, **facts: Any) -> None:
        """Append a measurement to the file, and print it."""
        line = json.dumps(tree_map(lambda x: float(f"{x:.6g}") if isinstance(x, float) else x, facts))
        with self.file.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def time_left(self) -> float:
        return self.deadline - time.monotonic()

    def has_time(self, seconds: float, **facts: Any) -> bool:
        """Return whether a measurement of this many seconds can start; otherwise record that it is left out."""
        if self.time_left() >= seconds:
            return True
        self.record(**facts, error="left out: no time left")
        return False

    @contextmanager
    def attempt(self, **facts: Any) -> Iterator[None]:
        """Record an error of the block, such as a lack of memory, and go on behind it."""
        try:
            yield
        except Exception as error:
            self.record(**facts, error=describe(error))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def warm_up(self, contestants: dict[str, Callable[[], object]], calls: int = 2) -> dict[str, str]:
        """Compile and run each contestant; remove those that fail, and return their errors by name."""
        errors = {}
        for name, run in list(contestants.items()):
            try:
                for _ in range(calls):
                    run()
                self.synchronize()
            except Exception as error:
                errors[name] = describe(error)
                del contestants[name]
        return errors

    def in_turn(self, contestants: dict[str, Callable[[], object]], *, kernels_only: bool = False) -> dict[str, float]:
        """Median milliseconds of each warm contestant. They run A B C A B C ..., within `MEASURE_SECONDS` or so."""
        times: dict[str, list[float]] = {name: [] for name in contestants}
        begin = time.monotonic()
        for lap in range(MIN_ROUNDS if self.smoke else MAX_ROUNDS):
            spent = time.monotonic() - begin
            if lap >= MIN_ROUNDS and (spent > MEASURE_SECONDS or self.time_left() < spent / lap):
                break
            for name, run in contestants.items():
                times[name].append(self.milliseconds(run, kernels_only=kernels_only))
        return {name: sorted(values)[len(values) // 2] for name, values in times.items()}

    def milliseconds(self, run: Callable[[], object], *, kernels_only: bool = False) -> float:
        """Time of one call from an idle device to an idle device.

        kernels_only  without the time to launch the kernels, which in training is hidden by the kernels before them:
                      the device waits until the host has queued the call
        """
        self.synchronize()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - begin)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if kernels_only:
            torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def describe(error: Exception) -> str:
    """Return an error as one short line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return " ".join(f"{type(error).__name__}: {error}".split())[:MAX_MESSAGE]
