"""Time of this checkout against another one, in turn in one run, to find slowdowns.

    git worktree add ../before COMMIT
    python -m benchmarks.versus ../before [--pairs 15] [--only attention]

Each checkout runs the contestants of its own benchmarks in a separate process with one thread; they take turns, new old
new old. The ratio is the median over the pairs of new / old, with its quartiles: below 1 is faster.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

HERE = Path(__file__).parent.parent
REPEATS = 50  # of contestants that take milliseconds


def training_step(length: int) -> Callable[[], object]:
    return importlib.import_module("benchmarks.training_step").ours(length, 1)


def attention(length: int, mask: str) -> Callable[[], object]:
    from_attention = importlib.import_module("benchmarks.attention")
    lower, attend = (getattr(importlib.import_module("sightline.attention"), name) for name in ("lower", "attend"))
    lowered = lower(from_attention.masks(length)[mask], device="cpu", dtype=torch.float32, training=True)
    q, k, v = (torch.randn(1, length, 8, 64).transpose(1, 2).requires_grad_() for _ in range(3))
    grad = torch.randn(1, length, 8, 64).transpose(1, 2)
    return from_attention.step(q, k, v, grad, lambda q, k, v: attend(q, k, v, lowered))


def masks(length: int, work: str) -> Callable[[], object]:
    rules = importlib.import_module("sightline.masks")
    lower = importlib.import_module("sightline.attention").lower
    ids = importlib.import_module("benchmarks.timing").lognormal_documents(length)
    mask = rules.causal(1, length) & rules.document(ids)
    once = {
        "rules": lambda: rules.causal(1, length) & rules.document(ids),
        "window": lambda: rules.sliding_window(1, length, 256) & rules.document(ids),
        "lower": lambda: lower(mask, device="cpu", dtype=torch.float32, training=True),
        "BlockMask": mask.to_block_mask,
    }[work]
    return lambda: [once() for _ in range(REPEATS)]


def context_step(length: int) -> Callable[[], object]:
    return importlib.import_module("benchmarks.context_step").shared("needed keys", length, "lognormal")


CONTESTANTS: dict[str, tuple[Callable[..., Callable[[], object]], tuple[object, ...]]] = {
    "training_step, S = 2048": (training_step, (2048,)),
    "training_step, S = 8192": (training_step, (8192,)),
    "attention, S = 8192, documents": (attention, (8192, "documents, lognormal")),
    "attention, S = 8192, window 256": (attention, (8192, "window 256, 3 long")),
    "attention, S = 8192, shared prefix": (attention, (8192, "shared prefix, 8 responses")),
    "50 masks, S = 32768, causal & document": (masks, (32768, "rules")),
    "50 masks, S = 32768, window": (masks, (32768, "window")),
    "50 masks, S = 32768, lower": (masks, (32768, "lower")),
    "50 masks, S = 32768, BlockMask": (masks, (32768, "BlockMask")),
    "context_step, S = 8192": (context_step, (8192,)),
}


def serve() -> None:
    """Read names of contestants from stdin, one per line; run each once and print its seconds."""
    torch.set_num_threads(1)
    answers, sys.stdout = sys.stdout, sys.stderr
    running: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in running:
            running.clear()  # keep one contestant at a time, so that its memory does not slow down the next
            maker, arguments = CONTESTANTS[name]
            running[name] = maker(*arguments)
        begin = time.perf_counter()
        running[name]()
        print(time.perf_counter() - begin, file=answers, flush=True)


def start(checkout: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
    return subprocess.Popen(
        command, cwd=checkout, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def seconds(process: subprocess.Popen[str], name: str) -> float:
    assert process.stdin is not None and process.stdout is not None
    print(name, file=process.stdin, flush=True)
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, nargs="?", help="the root of the other checkout")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--only", default="", help="only contestants whose name contains this")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if options.other is None or not (options.other / "benchmarks").is_dir():
        parser.error(f"expected the root of another checkout of this project, got {options.other}")
    table = Table(title=f"this checkout against {options.other}, {options.pairs} pairs in turn, one thread")
    for column in ("", "new ms", "old ms", "new / old", "quartiles"):
        table.add_column(column, justify="right" if column else "left")
    for name in track([name for name in CONTESTANTS if options.only in name], console=Console(stderr=True)):
        new, old = start(HERE), start(options.other)
        for process in (new, old, new, old):  # warm-up
            seconds(process, name)
        pairs = [(seconds(new, name), seconds(old, name)) for _ in range(options.pairs)]
        for process in (new, old):
            process.kill()
        low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
        medians = (f"{1e3 * statistics.median(times):.2f}" for times in zip(*pairs, strict=True))
        table.add_row(name, *medians, f"{middle:.3f}", f"{low:.3f} - {high:.3f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
