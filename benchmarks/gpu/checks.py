"""The tests marked `gpu`."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.gpu.bench import MAX_MESSAGE, Bench
from benchmarks.gpu.parts import ROOT

MARK = "@pytest.mark.gpu"


def run_tests(bench: Bench) -> None:
    """Run pytest in its own process, and record the number of tests by outcome, then each failure.

    Only files with such tests are collected: others may need packages that this machine lacks.
    """
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if MARK in path.read_text()]
    report = bench.file.with_suffix(".xml")
    report.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider",
        "--continue-on-collection-errors", f"--junitxml={report}", *files,
    ]  # fmt: skip
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=bench.time_left(), check=False).returncode
    except subprocess.TimeoutExpired:
        bench.record(outcome="stopped", count=0, detail="the tests took too long")
        return
    if not report.exists():
        bench.record(outcome="not run", count=0, detail=f"pytest ended with exit code {code}, see the log")
        return
    for facts in read_outcomes(report):
        bench.record(**facts)


def read_outcomes(report: Path) -> list[dict[str, object]]:
    """Return the outcomes of a JUnit file: the number of tests by outcome, then each test that failed."""
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    failures: list[dict[str, object]] = []
    for case in ElementTree.parse(report).iter("testcase"):
        failure = next((child for child in case if child.tag in ("failure", "error")), None)
        outcome = "failed" if failure is not None else "skipped" if case.find("skipped") is not None else "passed"
        counts[outcome] += 1
        if failure is not None:
            text = " ".join((failure.get("message") or failure.text or "").split())[:MAX_MESSAGE]
            failures.append({"outcome": "failed", "detail": f"{case.get('name')}: {text}"})
    return [*({"outcome": name, "count": count} for name, count in counts.items()), *failures]
