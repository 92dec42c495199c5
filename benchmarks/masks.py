"""Time to build masks and to convert them to tiles and block masks, against create_block_mask.

    python -m benchmarks.masks [--lengths 2048 4096 ... 131072] [--threads 1]
    python -m benchmarks.masks --intervals 8 64 361     # lowering for training, by the number of intervals of a query

Writes the measurements, and docs/mask_cost.png: time against S in a log-log plot, where linear has a slope of 1.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.attention import masks as attention_masks
from benchmarks.attention import step
from benchmarks.timing import in_turn, lognormal_documents, machine, positions_of, save
from sightline.attention import attend, lower
from sightline.attention.tiles import build_tiles
from sightline.masks import AttentionMask, causal, document, prefix_lm, shared_prefix, sliding_window

MAX_TORCH_LENGTH = 16384  # create_block_mask evaluates every pair: 17 GB of indices at 64k
INTERVALS_LENGTH = 4096
PLOT = Path(__file__).parent.parent / "docs" / "mask_cost.png"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    lengths = [2048, 4096, 8192, 16384, 32768, 65536, 131072]
    parser.add_argument("--lengths", type=int, nargs="+", default=lengths)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--intervals", type=int, nargs="+", help="numbers of intervals (K) to lower at S = 4096")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.intervals:
        lower_many(options.intervals)
    else:
        compare(options.lengths, options.rounds, options.threads)


def compare(lengths: list[int], rounds: int, threads: int) -> None:
    """Time masks and their conversions at several lengths."""
    table = Table(title=f"masks, ms, lognormal documents of median 300, {machine()}")
    for name in (
        "S", "causal & document", "window", "prefix-LM", "shared prefix", "tiles", "window tiles", "BlockMask",
        "BlockMask, forward", "create_block_mask", "times faster",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    rows: list[dict[str, object]] = []
    for length in lengths:
        ids = lognormal_documents(length)
        positions = positions_of(ids)
        prompts = ids - ids % 9
        order = causal(1, length)

        def build(length=length, ids=ids) -> AttentionMask:
            return causal(1, length) & document(ids)

        mask = build()
        window = sliding_window(1, length, 256) & document(ids)
        contestants = {
            "build": build,
            "window": lambda length=length, ids=ids: sliding_window(1, length, 256) & document(ids),
            "prefix": lambda order=order, ids=ids, p=positions: (
                (prefix_lm(p, torch.full_like(p, 100)) | order) & document(ids)
            ),
            "shared": lambda order=order, ids=ids, prompts=prompts: shared_prefix(ids, prompts) & order,
            "tiles": lambda mask=mask: build_tiles(mask.start, mask.stop),
            "window_tiles": lambda mask=window: build_tiles(mask.start, mask.stop),
            "blocks": mask.to_block_mask,
            "blocks_forward": lambda mask=mask: mask.to_block_mask(compute_q_blocks=False),
        }
        seconds = in_turn(contestants, rounds)
        if length <= MAX_TORCH_LENGTH:
            seconds |= in_turn(
                {
                    "theirs": lambda mask=mask, length=length: create_block_mask(
                        mask.mask_mod, 1, None, length, length, device="cpu"
                    ),
                    "blocks": mask.to_block_mask,
                },
                3,
            )
        row: dict[str, object] = {name: 1e3 * value for name, value in seconds.items()}
        rows.append({"length": length, **row})
        theirs = f"{row['theirs']:.0f}" if "theirs" in row else "-"
        times = f"{seconds['theirs'] / seconds['blocks']:.0f}x" if "theirs" in row else "-"
        names = ("build", "window", "prefix", "shared", "tiles", "window_tiles", "blocks", "blocks_forward")
        table.add_row(str(length), *(f"{row[name]:.2f}" for name in names), theirs, times)
    Console(width=140).print(table)
    save(f"masks-{threads}t", rows)
    plot(rows)


def lower_many(numbers: list[int]) -> None:
    """Time `lower` for training on a CPU against the attention itself and against SDPA with a dense mask.

    One call each, since lowering may take seconds.
    """
    table = Table(title=f"S = {INTERVALS_LENGTH}, ms, H = 8, D = 64, forward + backward, {machine()}")
    for name in ("mask", "backend", "lower", "attention", "dense mask"):
        table.add_column(name, justify="right")
    grad = torch.randn(1, 8, INTERVALS_LENGTH, 64)
    q, k, v = (torch.randn_like(grad).requires_grad_() for _ in range(3))
    masks = {f"K = {number}": scattered(INTERVALS_LENGTH, number) for number in numbers}
    masks["every third row empty"] = attention_masks(INTERVALS_LENGTH)["every third row empty"]
    rows: list[dict[str, object]] = []
    for name, mask in masks.items():
        begin = time.perf_counter()
        lowered = lower(mask, device="cpu", dtype=torch.float32, training=True, head_dim=64)
        seconds = {"lower": time.perf_counter() - begin}
        dense = mask.to_dense().unsqueeze(1)
        seconds |= in_turn(
            {
                "attention": step(q, k, v, grad, lambda q, k, v, m=lowered: attend(q, k, v, m)),
                "dense mask": step(
                    q, k, v, grad, lambda q, k, v, d=dense: F.scaled_dot_product_attention(q, k, v, attn_mask=d)
                ),
            },
            1,
        )
        rows.append({"mask": name, "backend": lowered.backend.name, **{key: 1e3 * s for key, s in seconds.items()}})
        table.add_row(name, lowered.backend.name, *(f"{1e3 * s:.1f}" for s in seconds.values()))
    Console(width=140).print(table)
    save("masks-intervals", rows)


def scattered(length: int, intervals: int) -> AttentionMask:
    """Mask in which each query attends to `intervals` single keys, spread over the row and moved with the query."""
    period = length // intervals
    if period < 2:
        raise SystemExit(f"--intervals: expected at most {length // 2} for S = {length}, got {intervals}")
    moved = torch.arange(length).unsqueeze(1) % (period - 1)
    start = (torch.arange(intervals) * period + moved).unsqueeze(0)
    return AttentionMask.from_intervals(start, start + 1, length)


def plot(rows: list[dict[str, object]]) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    names = {
        "build": "causal & document",
        "tiles": "tiles (CPU kernel)",
        "blocks": "BlockMask",
        "theirs": "create_block_mask",
    }
    for name, label in names.items():
        points = [(row["length"], row[name]) for row in rows if name in row]
        axes.loglog(*zip(*points, strict=True), marker="o", label=label, base=2)
    first = rows[0]
    linear = [first["build"] * row["length"] / first["length"] for row in rows]  # type: ignore[operator]
    axes.loglog([row["length"] for row in rows], linear, color="gray", linestyle=":", label="linear in S", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="tokens of a row (S)", ylabel="ms", title="Time to build a mask, on one CPU core")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(PLOT, dpi=120)


if __name__ == "__main__":
    main()
