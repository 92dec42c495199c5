"""Peak memory of attention, forward + backward, at S = 32768: several masks against plain causal SDPA.

    python -m benchmarks.memory [--length 32768] [--backend native] [--only "one document" window]

Each mask runs in a separate process, with one thread. The memory of the process after a step of a short row is
subtracted: the first step loads code and allocates workspaces of a constant size. The mask is lowered in the measured
step.
"""

from __future__ import annotations

import argparse
import multiprocessing
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.attention import masks, usable_backends
from benchmarks.timing import machine, peak_mib, save
from sightline.attention import attend
from sightline.masks import AttentionMask, causal

PLAIN = "plain causal SDPA"


def measure(pipe: Connection, mask: AttentionMask | None, length: int, backend: str) -> None:
    """Send the growth of this process's peak memory in MiB; without a mask, for plain causal SDPA.

    The mask is built by the parent, so that its temporaries are not part of the memory before the step.
    """
    torch.set_num_threads(1)
    step(inputs(64), None if mask is None else causal(1, 64), backend)
    qkv = inputs(length)
    before = peak_mib()
    step(qkv, mask, backend)
    pipe.send(peak_mib() - before)


def inputs(length: int) -> list[Tensor]:
    return [torch.randn(1, length, 8, 64).transpose(1, 2).requires_grad_() for _ in range(3)]


def step(qkv: list[Tensor], mask: AttentionMask | None, backend: str) -> None:
    q, k, v = qkv
    if mask is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        out = attend(q, k, v, mask, backend=backend)
    out.backward(torch.ones_like(out))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usable = [name for name, reason in usable_backends(torch.float32).items() if reason is None]
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--backend", choices=["auto", *usable], default="auto")
    parser.add_argument("--only", nargs="+", default=[""], help="only masks whose name contains one of these")
    options = parser.parse_args(arguments)
    context = multiprocessing.get_context("spawn")
    chosen = {name: mask for name, mask in masks(options.length).items() if any(part in name for part in options.only)}
    found: dict[str, float] = {}
    for name, mask in {PLAIN: None, **chosen}.items():
        here, there = context.Pipe()
        process = context.Process(target=measure, args=(there, mask, options.length, options.backend))
        process.start()
        there.close()  # so that a process that dies ends the wait below
        found[name] = here.recv()
        process.join()
    title = f"peak memory of attention, {options.backend}, S={options.length}, H=8 D=64, float32, {machine()}"
    table = Table(title=title)
    for column in ("mask", "MiB", "of plain causal"):
        table.add_column(column, justify="left" if column == "mask" else "right")
    for name, mib in found.items():
        table.add_row(name, f"{mib:.0f}", f"{mib / found[PLAIN]:.2f}x")
    Console().print(table)
    rows: list[dict[str, object]] = [
        {"mask": name, "mib": mib, "of_plain": mib / found[PLAIN]} for name, mib in found.items()
    ]
    save(f"memory-{options.backend}", rows)


if __name__ == "__main__":
    main()
