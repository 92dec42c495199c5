"""The short form of `python -m tests.soak`: ten faults, each kind at least once, on 1, 2 and 4 processes."""

import json
from pathlib import Path

import pytest

from tests.soak.record import KINDS, Record
from tests.soak.runs import count_missing
from tests.soak.soak import Soak, table


def write_record(directory: Path, *processes: tuple[int, dict[int, list[str]]]) -> Record:
    """Write the record of processes, each a rank and its documents by step, in the order of their starts."""
    directory.mkdir()
    for number, (rank, steps) in enumerate(processes):
        lines = [json.dumps({"step": step, "documents": documents}) for step, documents in steps.items()]
        (directory / f"{number:03d}-{rank}.jsonl").write_text("\n".join(lines) + '\n{"step": 9')
    return Record(directory)


def test_lost_and_repeated_documents_are_counted_over_the_surviving_history(tmp_path: Path) -> None:
    undisturbed = write_record(tmp_path / "undisturbed", (0, {1: ["a"], 2: ["b"], 3: ["c"]}), (1, {1: ["d"], 2: ["e"]}))
    expected = undisturbed.surviving_documents(2)
    # Both ranks make steps 2 and 3 again, as they resume from step 1.
    first, second = {1: ["a"], 2: ["b"], 3: ["c"]}, {2: ["b"], 3: ["c"]}
    resumed = write_record(tmp_path / "resumed", (0, first), (1, {1: ["d"]}), (0, second), (1, {2: ["e"]}))
    assert resumed.surviving_documents(2) == expected
    wrong = write_record(
        tmp_path / "wrong", (0, first), (1, {1: ["d"]}), (0, {2: ["b"], 3: ["b"]}), (1, {2: ["e", "e"]})
    )
    found = wrong.surviving_documents(2)
    assert count_missing(expected, found) == 1 and count_missing(found, expected) == 2


@pytest.mark.slow
def test_runs_under_faults_equal_undisturbed_runs(tmp_path: Path) -> None:
    soak = Soak(tmp_path, [1, 2, 4])
    soak.inject(10, KINDS)
    injected = [kind for result in soak.results for kind in result.faults]
    assert len(injected) == 10 and set(injected) == set(KINDS), injected
    assert all(result.good for result in soak.results), table(soak.results)
