"""Peak memory of attention, forward + backward, at S = 32768: several masks against plain causal SDPA.

    python -m benchmarks.memory [--length 32768]

Each mask runs in a separate process. The memory of the process before the first step is subtracted.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from benchmarks.attention import masks
from benchmarks.timing import machine, save
from sightline.attention import attend

PLAIN = "plain causal SDPA"


def peak() -> float:
    """Peak memory of this process in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(pipe: Connection, name: str, length: int) -> None:
    torch.set_num_threads(1)
    mask = None if name == PLAIN else masks(length)[name]
    q, k, v = (torch.randn(1, length, 8, 64).transpose(1, 2).requires_grad_() for _ in range(3))
    before = peak()
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True) if mask is None else attend(q, k, v, mask)
    out.backward(torch.ones_like(out))
    pipe.send(peak() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: dict[str, float] = {}
    for name in (PLAIN, *masks(options.length)):
        here, there = context.Pipe()
        process = context.Process(target=measure, args=(there, name, options.length))
        process.start()
        found[name] = here.recv()
        process.join()
    table = Table(title=f"peak memory of attention, S={options.length}, H=8 D=64, float32, {machine()}")
    for name in ("mask", "MiB", "of plain causal"):
        table.add_column(name, justify="left" if name == "mask" else "right")
    for name, mib in found.items():
        table.add_row(name, f"{mib:.0f}", f"{mib / found[PLAIN]:.2f}x")
    Console().print(table)
    save("memory", [{"mask": name, "mib": mib, "of_plain": mib / found[PLAIN]} for name, mib in found.items()])


if __name__ == "__main__":
    main()
