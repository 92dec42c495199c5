"""The record of a run: the documents of each step on each rank, and the fault that the ranks shall inject.

RECORD/NANOSECONDS-RANK.jsonl  one file per process, created at its start: a line with the documents of each step
RECORD/fault.json              the fault to inject, which the driver writes at any time
RECORD/fired-NUMBER-RANK       created by a rank that has injected it
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

KILL, TERM, STOP, CUT, FLIP = "SIGKILL", "SIGTERM", "SIGSTOP", "cut file", "flipped bit"
DISK_FULL, WORKER, NON_FINITE = "disk full", "dead worker", "non-finite loss"
KINDS = (KILL, TERM, STOP, DISK_FULL, CUT, FLIP, WORKER, NON_FINITE)
"""The ranks inject a full disk, a dead worker and a non-finite loss; the driver injects all others."""


class Record:
    """The record of one run in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fault_file = directory / "fault.json"

    def fired_file(self, number: int, rank: int) -> Path:
        return self.directory / f"fired-{number}-{rank}"

    def has_fired(self, number: int) -> bool:
        """Return whether a rank has injected this fault."""
        return any(self.directory.glob(f"fired-{number}-*"))

    def write_fault(self, **fault: Any) -> None:
        """Ask the ranks to inject a fault."""
        temporary = self.directory / "fault.partial"
        temporary.write_text(json.dumps(fault))
        temporary.rename(self.fault_file)

    def attempts(self, rank: int = 0) -> list[Path]:
        """Return the files of the processes that were this rank, oldest first."""
        return sorted(self.directory.glob(f"*-{rank}.jsonl"))

    def steps(self, attempt: int) -> list[int]:
        """Return the steps that rank 0 has finished in its n-th process, which may not have started yet."""
        files = self.attempts()
        return [line["step"] for line in _lines(files[attempt])] if 0 <= attempt < len(files) else []

    def surviving_documents(self, world: int) -> dict[int, Counter[str]]:
        """Return the documents' parts of each step, over all ranks, that the final weights were trained on.

        A process that resumes from step N makes the later steps again, so the last process that made a step counts.
        """
        by_rank = [
            {line["step"]: line["documents"] for file in self.attempts(rank) for line in _lines(file)}
            for rank in range(world)
        ]
        steps = sorted(set().union(*by_rank))
        return {step: Counter(part for rank in by_rank for part in rank.get(step, [])) for step in steps}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines of a file that a process may be writing."""
    return [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
