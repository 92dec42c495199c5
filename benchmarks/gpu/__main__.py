"""Everything that is to be measured on one GPU, in less than nine minutes.

    python -m benchmarks.gpu [--parts kernels masks] [--output DIR]
    python -m benchmarks.gpu --smoke      on a CPU: run the same code in small sizes, to test it

Each part runs in its own process with a time limit, so that a crash, a hang or a lack of memory in one of them loses
nothing of the others. Every measurement is written when it is made (DIR/PART.jsonl, the output of the process in
DIR/PART.log); after each part, DIR/gpu.json and DIR/gpu.md hold all that has been measured.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.parts import PARTS, RESERVE, command_of, run_part
from benchmarks.gpu.report import describe_machine, write_report
from benchmarks.timing import RESULTS

TOTAL_SECONDS = 520.0
MIN_SECONDS = 20.0  # a part with less time than this does not start


def measure(name: str, rows: Path, seconds: float, *, smoke: bool) -> None:
    """Run a part in this process."""
    module, function = PARTS[name].function.split(":")
    bench = Bench(rows, seconds - RESERVE, smoke=smoke)
    getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function)(bench)


def run_parts(names: list[str], output: Path, *, smoke: bool) -> bool:
    """Run parts one after the other; return whether all of them finished."""
    console = Console()
    end = time.monotonic() + TOTAL_SECONDS
    machine = describe_machine(smoke=smoke)
    console.print(machine)
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        seconds = min(PARTS[name].seconds, end - time.monotonic())
        if seconds < MIN_SECONDS:
            results[name] = {"status": "not started: no time left", "seconds": 0.0, "rows": []}
        else:
            rows = output / f"{name}.jsonl"
            results[name] = run_part(command_of(name, rows, seconds, smoke=smoke), rows, seconds)
        write_report(output, machine, results)
        result = results[name]
        summary = f"{name}: {result['status']}, {result['seconds']:.0f} s, {len(result['rows'])} rows"
        console.print(summary, highlight=False)
        for line in result.get("log", []):
            console.print(f"    {line}", highlight=False, markup=False)
    console.print((output / "gpu.md").read_text(), highlight=False, markup=False, soft_wrap=True)
    console.print(f"written: {output / 'gpu.json'}, {output / 'gpu.md'}", highlight=False)
    return all(result["status"] == "finished" for result in results.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu", metavar="DIR")
    parser.add_argument("--smoke", action="store_true", help="on the CPU, in small sizes")
    for name, kind in (("--run", str), ("--rows", Path), ("--seconds", float)):  # for the process of a part
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        parser.error("found no CUDA device; run it on a machine with one, or test it with --smoke")
    if options.run:
        measure(options.run, options.rows, options.seconds, smoke=options.smoke)
        return
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    raise SystemExit(0 if run_parts(options.parts, output, smoke=options.smoke) else 1)


if __name__ == "__main__":
    main()
