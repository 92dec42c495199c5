"""Context-parallel plans: load balance, exchanged keys and planning time of each order and of PyTorch's load balancers.

    python -m benchmarks.context_plan [--rounds 9]

Rows of 32k tokens on 8 ranks and of 128k on 64. `received` is the number of received keys as a share of an all-gather
or a ring, which send (degree - 1) / degree of the row to every rank, for every mask. PyTorch's balancers only assign
tokens to ranks and then all-gather all keys; the share shown for them counts only the keys that the assigned queries
attend to. A second table shows how many keys more imbalance saves: rows of documents of median 300 and sigma 0.9, with
the lower bound of received keys.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel._load_balancer import (
    _PerDocumentHeadTailLoadBalancer,
    _PTRRLoadBalancer,
)

from benchmarks.timing import lognormal_documents, machine, positions_of, save
from sightline.masks import AttentionMask, causal, chunked, document, sliding_window
from sightline.parallel import plan_context
from sightline.parallel.context.plan import ORDERS, ContextPlan
from sightline.parallel.context.transfers import build_pieces, find_key_ranges, find_transfers
from sightline.plots.context_png import plot_context_plan

PLOT = Path(__file__).parent.parent / "docs" / "context_plan.png"


class Layout(NamedTuple):
    name: str
    document_ids: Tensor
    masks: dict[str, AttentionMask]
    layers: dict[str, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for length, degree in ((32768, 8), (131072, 64)):
        for layout in build_layouts(length):
            rows += measure(layout, degree, options.rounds)
    table = Table(title=f"context-parallel plans, {machine()}")
    for name in (
        "documents and masks",
        "ranks",
        "order",
        "work max / mean",
        "received",
        "pieces a rank",
        "plan, ms",
        "shard, ms",
    ):
        table.add_column(name, justify="left" if name in ("documents and masks", "order") else "right")
    for row in rows:
        shard = f"{row['shard']:.2f}" if "shard" in row else "-"
        table.add_row(
            str(row["layout"]), str(row["degree"]), str(row["order"]), f"{row['balance']:.3f}",
            f"{100 * row['received']:.1f} %", f"{row['pieces']:.1f}", f"{row['plan']:.2f}", shard,  # type: ignore[operator]
        )  # fmt: skip
    Console(width=140).print(table)
    save("context_plan", rows + compare_balances(options.rounds))
    ids = lognormal_documents(8192, rows=4)
    plot_context_plan(plan_context(causal(*ids.shape) & document(ids), 4), PLOT)


def compare_balances(rounds: int) -> list[dict[str, object]]:
    """Print and return work, received keys, their lower bound and planning time for several limits on work."""
    length, degree, layouts = 32768, 8, 20
    generators = [torch.Generator().manual_seed(seed) for seed in range(layouts)]
    masks = []
    for generator in generators:
        lengths = (300 * (0.9 * torch.randn(length, generator=generator)).exp()).long().clamp(min=1)[:1000]
        ids = torch.repeat_interleave(torch.arange(1000), lengths)[None, :length]
        masks.append(causal(1, length) & document(ids))
    all_gather = (degree - 1) * length
    lines: list[dict[str, object]] = []
    table = Table(
        "balance", "work max / mean", "received", "least", "most", "lower bound", "received / bound", "plan, ms"
    )
    for balance in (1.02, 1.05, 1.1, 1.3):
        plans = [plan_context(mask, degree, balance=balance) for mask in masks]
        received = np.array([int(plan.received_keys().sum()) for plan in plans]) / all_gather
        bounds = np.array([plan.least_keys() for plan in plans]) / all_gather
        work = max(float(plan.work().max() / plan.work().double().mean()) for plan in plans)
        ratio = float(np.median(received / np.maximum(bounds, 1 / all_gather)))
        planners = {str(row): partial(plan_context, mask, degree, balance=balance) for row, mask in enumerate(masks)}
        slowest = 1e3 * max(cpu_seconds(planners, rounds).values())
        shares = [f"{100 * x:.2f} %" for x in (received.mean(), received.min(), received.max(), bounds.mean())]
        table.add_row(f"{balance}", f"{work:.3f}", *shares, f"{ratio:.2f}", f"{slowest:.1f}")
        line = {"balance": balance, "work": work, "received": received.tolist(), "bounds": bounds.tolist()}
        lines.append({"layout": "lognormal, sigma 0.9", "degree": degree, **line, "plan": slowest})
    table.title = f"{layouts} layouts of 32k tokens on {degree} ranks: mean, minimum and maximum of received keys"
    Console(width=140).print(table)
    return lines


def build_layouts(length: int) -> list[Layout]:
    """Lognormal documents of median 300; half a row of one document among those of median 100; with two masks each."""
    usual = lognormal_documents(length)
    half = lognormal_documents(length, median=100)
    long = torch.cat(
        [half[:, : length // 4], torch.full((1, length // 2), length), half[:, length // 4 : length // 2]], 1
    )
    long = long.to(torch.int32)
    full, long_full = causal(1, length) & document(usual), causal(1, length) & document(long)
    window = sliding_window(1, length, 128) & full
    chunk = chunked(positions_of(long), 8192) & long_full
    return [
        Layout("lognormal", usual, {"full": full}, {"full": 1}),
        Layout("one long, many short", long, {"full": long_full}, {"full": 1}),
        Layout("lognormal, window 128 + full", usual, {"full": full, "window": window}, {"full": 1, "window": 1}),
        Layout("one long, chunk 8192 + full", long, {"full": long_full, "chunk": chunk}, {"full": 1, "chunk": 3}),
    ]


def measure(layout: Layout, degree: int, rounds: int) -> list[dict[str, object]]:
    """One result per order. PyTorch's balancers take one mask and get the full one."""
    plans: dict[str, tuple[ContextPlan, dict[str, int]]] = {}
    planners: dict[str, Callable[[], object]] = {}
    for order in ORDERS:
        planners[order] = lambda order=order: plan_context(layout.masks, degree, order, layers=layout.layers)
        plans[order] = planners[order](), layout.layers  # type: ignore[assignment]
    blocks = layout.masks["full"].to_block_mask()
    planners["PyTorch PTRR"] = lambda: _PTRRLoadBalancer(blocks, degree)._generate_indices()
    plans["PyTorch PTRR"] = (
        build_plan(layout.masks, owners_of_shards(planners["PyTorch PTRR"](), degree), degree),
        layout.layers,
    )
    if len(layout.masks) == 1:
        rounded = round_documents(layout.document_ids, 2 * degree)
        planners["PyTorch per document"] = lambda: per_document(rounded, degree)._generate_indices()
        masks = {"full": causal(1, rounded.shape[1]) & document(rounded)}
        plans["PyTorch per document"] = build_plan(masks, owners_by_document(rounded, degree), degree), layout.layers
    seconds = cpu_seconds(planners, rounds)
    shards = cpu_seconds(
        {o: lambda o=o: [plans[o][0].shard(degree // 2, name) for name in layout.masks] for o in ORDERS}, rounds
    )
    lines = []
    for order, (plan, layers) in plans.items():
        length = plan.shape[1]
        line: dict[str, object] = {"layout": layout.name, "degree": degree, "order": order}
        work = weighted_work(plan, layers)
        line["balance"] = float(work.max() / work.mean())
        line["received"] = int(plan.received_keys().sum()) / (len(plan.masks) * (degree - 1) * length)
        line["pieces"] = len(plan.pieces.rank) / degree
        line["plan"] = 1e3 * seconds[order]
        if order in shards:
            line["shard"] = 1e3 * shards[order]
        lines.append(line)
    return lines


def cpu_seconds(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of this thread for each contestant; they run in turn, and the first round is warm-up."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds + 1):
        for name, run in contestants.items():
            begin = time.thread_time()
            run()
            times[name].append(time.thread_time() - begin)
    return {name: sorted(values[1:])[rounds // 2] for name, values in times.items()}


def weighted_work(plan: ContextPlan, layers: dict[str, int]) -> np.ndarray:
    """Visible pairs of each rank, summed over all layers: float64 [degree]."""
    work = np.zeros(plan.degree)
    for name, mask in plan.masks.items():
        pairs = (mask.stop - mask.start).sum(dim=2).flatten().numpy()
        np.add.at(work, plan.pieces.rank, layers[name] * np.add.reduceat(pairs, plan.pieces.first))
    return work


def build_plan(masks: dict[str, AttentionMask], owner: Tensor, degree: int) -> ContextPlan:
    """Plan of one row for a given owner rank of each token: int64 [S]."""
    edges = [0, *(owner.diff().nonzero().flatten() + 1).tolist(), len(owner)]
    pieces = build_pieces([[(first, last, int(owner[first])) for first, last in pairwise(edges)]])
    needs = {name: find_key_ranges(mask, pieces) for name, mask in masks.items()}
    transfers = {name: find_transfers(need, pieces, len(owner)) for name, need in needs.items()}
    return ContextPlan(masks, degree, pieces, needs, transfers, dict.fromkeys(masks, 1))


def owners_of_shards(indices: object, degree: int) -> Tensor:
    """Owner of each token [S] if the row, reordered by `indices` [1, S], is split into contiguous parts."""
    assert isinstance(indices, Tensor)
    owner = torch.empty(indices.shape[1], dtype=torch.int64)
    owner[indices[0].long()] = torch.arange(degree).repeat_interleave(indices.shape[1] // degree)
    return owner


def document_lengths(document_ids: Tensor) -> list[int]:
    return torch.unique_consecutive(document_ids[0], return_counts=True)[1].tolist()


def round_documents(document_ids: Tensor, multiple: int) -> Tensor:
    """Document ids, each document padded to the multiple that the per-document balancer requires; padding is work."""
    lengths = torch.tensor([-(-length // multiple) * multiple for length in document_lengths(document_ids)])
    return torch.repeat_interleave(torch.arange(len(lengths)), lengths)[None].to(torch.int32)


def per_document(document_ids: Tensor, degree: int) -> _PerDocumentHeadTailLoadBalancer:
    return _PerDocumentHeadTailLoadBalancer([document_lengths(document_ids)], degree, "cpu")


def owners_by_document(document_ids: Tensor, degree: int) -> Tensor:
    """Owner of each token [S] under the per-document balancer: rank r owns chunks r and 2 degree - 1 - r of a document.

    Its indices go document by document, so splitting them into equal parts, as PyTorch does, gives other owners.
    """
    indices = per_document(document_ids, degree)._generate_indices()[0]
    ranks = [torch.arange(degree).repeat_interleave(length // degree) for length in document_lengths(document_ids)]
    owner = torch.empty_like(indices)
    owner[indices] = torch.cat(ranks)
    return owner


if __name__ == "__main__":
    main()
