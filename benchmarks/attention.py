"""Time of attention, forward + backward, of several backends in turn, as a share of the limit of the machine.

    python -m benchmarks.attention [--lengths 2048 8192] [--backends native tiled] [--threads 2] [--dtype bfloat16]

The limit is the time of 14 x heads x head dim x visible pairs FLOPs (4 forward, 10 backward with its recomputation, as
FlashAttention counts) at the rate of a float32 matrix product of 1024 x 1024 on one thread, timed in turn in the same
run. With one thread, times are CPU times of the process, which leave out what other processes take; with several they
are wall times, and every backend runs with one thread and with all of them, in turn. Documents of 64 tokens are also
timed as a plain batched call, SDPA over [S / 64, H, 64, D].
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.timing import (
    GEMM_FLOPS,
    even_documents,
    gemm,
    in_turn,
    lognormal_documents,
    machine,
    positions_of,
    save,
)
from sightline.attention import BACKENDS, KernelRequirements, attend, lower
from sightline.masks import (
    AttentionMask,
    bidirectional,
    causal,
    chunked,
    document,
    prefix_lm,
    shared_prefix,
    sliding_window,
)

MAX_DENSE_LENGTH = 8192  # kernels that compute every pair take minutes for longer rows
BATCHED = "documents, 64 tokens"
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}


def masks(length: int) -> dict[str, AttentionMask]:
    """Masks of the table by name, each for one row of `length` tokens."""
    ids = lognormal_documents(length)
    long_ids = even_documents(length, 3)
    positions = positions_of(ids)
    index = torch.arange(length, dtype=torch.int32).unsqueeze(0)
    order = causal(1, length)
    packed = order & document(ids)
    rollouts = even_documents(length, 9 * max(1, length // 8192))
    prompts = rollouts - rollouts % 9  # one prompt, eight responses
    images = torch.where(index % 100 < 60, index // 100, -1)  # 60 image tokens, then 40 of text
    empty = index % 3 == 0
    return {
        "documents, lognormal": packed,
        "documents, 3 long": order & document(long_ids),
        "one document": order,
        BATCHED: order & document(index // 64),
        "documents, 20 tokens": order & document(index // 20),
        "window 128": sliding_window(1, length, 128),
        "window 512": sliding_window(1, length, 512),
        "window 256, lognormal": sliding_window(1, length, 256) & document(ids),
        "window 256, 3 long": sliding_window(1, length, 256) & document(long_ids),
        "chunk 512, lognormal": chunked(positions, 512) & packed,
        "prefix-LM 100, lognormal": (prefix_lm(positions, torch.full_like(positions, 100)) | order) & document(ids),
        "shared prefix, 8 responses": shared_prefix(rollouts, prompts) & order,
        "images in text": order | bidirectional(images),
        "neighborhood 7 x 7": neighborhood(length, 64),
        "every third row empty": AttentionMask(
            order.start.contiguous(), order.stop.masked_fill(empty.unsqueeze(2), 0), length
        ),
    }


def neighborhood(length: int, width: int, size: int = 7) -> AttentionMask:
    """Two-dimensional neighborhood of an image: a pixel attends to the size x size pixels around it, as in NATTEN.

    At the borders the neighborhood is moved inside the image. `length` is cut to full lines of `width` pixels.
    """
    lines = length // width
    pixel = torch.arange(length)
    y = (pixel // width).clamp(size // 2, max(size // 2, lines - 1 - size // 2))
    x = (pixel % width).clamp(size // 2, width - 1 - size // 2)
    line = y.unsqueeze(1) - size // 2 + torch.arange(size)  # [S, size]
    start = line * width + (x - size // 2).unsqueeze(1)
    inside = (line < lines) & (pixel < lines * width).unsqueeze(1)
    start = torch.where(inside, start, 0).unsqueeze(0)
    stop = torch.where(inside.unsqueeze(0), start + size, 0)
    return AttentionMask.from_intervals(start, stop, length)


def step(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, run: Callable[..., Tensor]) -> Callable[[], None]:
    """Return a function that runs forward and backward of `run(q, k, v)`."""

    def forward_backward() -> None:
        for x in (q, k, v):
            x.grad = None
        run(q, k, v).backward(grad)

    return forward_backward


def usable_backends(dtype: torch.dtype) -> dict[str, str | None]:
    """CPU backends by name, each with the reason why it cannot train in this dtype, or None if it can."""
    requirements = KernelRequirements(device=torch.device("cpu"), dtype=dtype, training=True)
    return {backend.name: backend.supports(requirements) for backend in BACKENDS}


class Bench:
    """Inputs and contestants of one length."""

    def __init__(self, options: argparse.Namespace, length: int) -> None:
        self.options, self.length = options, length
        self.dtype = getattr(torch, options.dtype)
        self.heads, self.head_dim = options.heads, options.head_dim
        self.kv_heads = options.kv_heads or options.heads
        self.q, self.k, self.v = (
            self.tensor(heads).requires_grad_() for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        self.grad = self.tensor(self.heads)

    def tensor(self, heads: int) -> Tensor:
        """Random values as the layers make them: [1, H, S, D], a transposed view of [1, S, H, D]."""
        return torch.randn(1, self.length, heads, self.head_dim, dtype=self.dtype).transpose(1, 2)

    def step(self, run: Callable[..., Tensor]) -> Callable[[], None]:
        return step(self.q, self.k, self.v, self.grad, run)

    def sdpa(self, **options: Any) -> Callable[[], None]:
        gqa = self.kv_heads != self.heads
        return self.step(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa, **options))

    def batched(self, size: int) -> tuple[list[Tensor], Callable[[], None]]:
        """Plain batched call over documents of equal size, each of them a row of the batch.

        Returns q, k, v [S / size, heads, size, D], views of the same memory, and the contestant.
        """
        documents = self.length // size

        def rows(x: Tensor) -> Tensor:
            pieces = x.detach()[:, :, : documents * size].transpose(1, 2)[0]
            return pieces.unflatten(0, (documents, size)).transpose(1, 2)

        leaves = [rows(x).requires_grad_() for x in (self.q, self.k, self.v)]
        gqa = self.kv_heads != self.heads
        q, k, v = leaves
        call = step(
            q, k, v, rows(self.grad),
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa),
        )  # fmt: skip
        return leaves, call

    def attention(self, mask: AttentionMask, backends: list[str]) -> dict[str, Callable[[], object]]:
        """Contestants by backend. All of them give the same output and gradients."""
        lowered = {
            name: lower(mask, backend=name, device="cpu", dtype=self.dtype, training=True, head_dim=self.head_dim)
            for name in backends
        }
        steps: dict[str, Callable[[], object]] = {
            name: self.step(lambda q, k, v, m=m: attend(q, k, v, m)) for name, m in lowered.items()
        }
        first: list[Tensor] | None = None
        for name, m in lowered.items():
            with torch.no_grad():
                out = attend(self.q, self.k, self.v, m)
            steps[name]()
            results = [out, *(x.grad for x in (self.q, self.k, self.v) if x.grad is not None)]
            first = results if first is None else first
            worst = max(float((x - y).norm() / y.norm()) for x, y in zip(results, first, strict=True))
            if worst > TOLERANCE[self.options.dtype]:
                raise SystemExit(f"{name} differs from {backends[0]} by {worst:.2g}: there is no use in timing it")
        return steps

    def measure(self, name: str, mask: AttentionMask) -> dict[str, object]:
        """Times of one mask: the contestants take turns with the matrix product."""
        options = self.options
        contestants = self.attention(mask, options.backends)
        timed: dict[str, Callable[[], object]] = {"gemm": with_threads(1, gemm())}
        for backend, run in contestants.items():
            timed[backend] = with_threads(options.threads, run)
            if options.threads > 1:
                timed[f"{backend}, one thread"] = with_threads(1, run)
        if name == BATCHED:
            timed["batched"] = with_threads(options.threads, self.batched(64)[1])
        if options.dense and self.length <= MAX_DENSE_LENGTH:
            timed["dense"] = with_threads(options.threads, self.sdpa(attn_mask=mask.to_dense().unsqueeze(1)))
            timed["causal row"] = with_threads(options.threads, self.sdpa(is_causal=True))
        clock = time.process_time if options.threads == 1 else time.perf_counter
        seconds = in_turn(timed, options.rounds, clock)
        pairs = int(mask.visible_pairs().sum())
        limit = 14 * self.heads * self.head_dim * pairs / (GEMM_FLOPS / seconds["gemm"])
        row: dict[str, object] = {"length": self.length, "mask": name, "intervals": mask.intervals, "pairs": pairs}
        for backend in options.backends:
            row[f"{backend} ms"] = 1e3 * seconds[backend]
            alone = seconds.get(f"{backend}, one thread", seconds[backend])
            row[f"{backend} of limit"] = limit / alone
            if options.threads > 1:
                row[f"{backend} speedup of {options.threads} threads"] = alone / seconds[backend]
        best = options.backends[0]
        for other in (*options.backends[1:], "batched", "dense", "causal row"):
            if other in seconds:
                row[f"{other} / {best}"] = seconds[other] / seconds[best]
        return row


def with_threads(threads: int, run: Callable[[], object]) -> Callable[[], object]:
    """Return a contestant that runs with this number of threads."""

    def timed() -> object:
        torch.set_num_threads(threads)
        return run()

    return timed


def show(rows: list[dict[str, object]], title: str) -> None:
    """Print the measurements, with a column for each key."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("intervals", "pairs")))
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == "mask" else "right")
    for row in rows:
        table.add_row(*(shown(column, row.get(column)) for column in columns))
    Console(width=160).print(table)


def shown(column: str, value: object) -> str:
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if column.endswith("of limit"):
        return f"{value:.0%}"
    return f"{value:.4g}" if column.endswith(" ms") else f"{value:.2f}x"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--backends", nargs="+", help="default: native, if it can be used, and tiled")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=None, help="default: the same number as --heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--threads", type=int, default=1, help="above 1: each backend also runs with one thread")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[""], help="only masks whose name contains one of these")
    parser.add_argument("--dense", action="store_true", help="also time SDPA with a dense mask, and plain causal")
    options = parser.parse_args(arguments)
    reasons = usable_backends(getattr(torch, options.dtype))
    options.backends = options.backends or [name for name in ("native", "tiled") if reasons.get(name, "") is None]
    for name in options.backends:
        if reasons.get(name, "it does not exist") is not None:
            usable = ", ".join(known for known, reason in reasons.items() if reason is None)
            parser.error(f"cannot time {name}: {reasons.get(name, 'it does not exist')}; usable backends: {usable}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    rows: list[dict[str, object]] = []
    for length in options.lengths:
        bench = Bench(options, length)
        for name, mask in masks(length).items():
            if any(part in name for part in options.only):
                rows.append(bench.measure(name, mask))
                Console(width=160).print(" ".join(f"{key}: {shown(key, value)};" for key, value in rows[-1].items()))
    shape = f"H={bench.heads} G={bench.kv_heads} D={bench.head_dim}"
    clock = "CPU time" if options.threads == 1 else "wall time"
    torch.set_num_threads(options.threads)
    show(rows, f"attention, forward + backward, {options.dtype}, {shape}, {clock}, {machine()}")
    sizes = f"h{bench.heads}-g{bench.kv_heads}-d{bench.head_dim}"
    save(f"attention-{sizes}-{options.dtype}-{options.threads}t", rows)


if __name__ == "__main__":
    main()
