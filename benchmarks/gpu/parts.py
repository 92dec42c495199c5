"""The parts of the measurements, and the processes that run them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESERVE = 10.0  # seconds of a part's limit for starting the process and for the measurement that runs
LOG_LINES = 15


@dataclass(frozen=True)
class Part:
    """A part: title of its table, the function that measures (`module:name` in this package), and its time limit."""

    title: str
    function: str
    seconds: float


PARTS = {
    "tests": Part("Tests marked `gpu`", "checks:run_tests", 90),
    "kernels": Part("Attention, forward + backward, 2k and 8k", "kernels:short", 90),
    "step-125m": Part("A training step, 125M parameters", "steps:small_model", 90),
    "step-8b": Part("A training step, layers of an 8B model", "steps:large_model", 85),
    "recompiles": Part("Compiled graphs over many layouts", "layouts:recompiles", 60),
    "masks": Part("Mask making", "layouts:mask_making", 40),
    "kernels-long": Part("Attention, forward + backward, 32k and 128k", "kernels:long", 65),
}
"""By name, in the order in which they run. No part takes more than two minutes, all of them less than nine."""


def run_part(command: list[str], rows: Path, seconds: float) -> dict[str, Any]:
    """Run a part in its own process for at most `seconds`; return its status, its time and its measurements.

    A process that hangs is killed with all processes that it started. The measurements that it has written are kept.

    rows  the file of JSON lines that the process writes
    """
    rows.unlink(missing_ok=True)
    log = rows.with_suffix(".log")
    begin = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
            status = "finished" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
        finally:
            kill_group(process)
    result: dict[str, Any] = {
        "status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "rows": read_rows(rows),
    }
    if status != "finished":
        result["log"] = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return result


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and the processes that it started, such as the workers of the compiler."""
    with contextlib.suppress(ProcessLookupError):  # raised if all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a file of JSON lines; a process that was killed may leave half a line."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def command_of(name: str, rows: Path, seconds: float, *, smoke: bool) -> list[str]:
    """Return the command of the process of a part."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--run", name, "--rows", str(rows), "--seconds", str(seconds)]
    return [*command, "--smoke"] if smoke else command
