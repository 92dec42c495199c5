"""The tables of `sightline plan`."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from sightline import config
from sightline.cli.first_batch import first_batch
from sightline.cli.output import tabulate, writing
from sightline.config import Run
from sightline.masks import AttentionMask
from sightline.numbers import count, flops, size
from sightline.parallel.context.plan import ORDERS, ContextPlan, plan_context
from sightline.parallel.mesh import AXES
from sightline.planning.estimate import Estimate, RankEstimate, estimate
from sightline.plots.context_png import plot_context_plan
from sightline.training.flops import GPU_PEAKS
from sightline.training.terminal import shown

DEGREES = (8, 64, 512)
CONTEXT_LEGEND = """
work: visible pairs of all layers, maximum over ranks / mean; keys: those received, as a fraction of an all-gather
(a ring sends as many), and the lower bound of plans whose work is as balanced; bytes/step: received by a rank in
all layers, on average. The order balanced allows a max/mean work of --parallel.context-balance {:g} in each row
"""
FAR = 1.3  # received keys as a multiple of the lower bound, above which the reason is printed
FAR_LEGEND = f"""
The order balanced receives more than {FAR} times the lower bound with context {{}}: the bound lets all documents but
the longest be divided at no cost, and the search for better plans stops after about 10 ms"""
"""Context degrees that are shown in addition to that of the run."""


def show_plan(title: str, run: Run, *, processes: int | None, gpu: str, rows: int, picture: Path | None) -> None:
    """Print the estimate of `run` on `processes` ranks; if that is None, on the product of its degrees."""
    world = processes or math.prod(max(1, getattr(run.parallel, axis)) for axis in AXES)
    console = Console(highlight=False)
    with Console(stderr=True).status("tracing the model"):
        found = estimate(run, world)
    show(console, title, run.training, found, gpu)
    if run.parallel.context > 1:
        show_context(console, title, run, found, rows, picture)


def show(console: Console, title: str, training: config.TrainingConfig, found: Estimate, gpu: str) -> None:
    """Print the tables: memory first, then communication, pipeline and FLOPs."""
    mesh, largest = found.mesh, found.largest
    degrees = [f"{axis} {mesh.size(axis)}" for axis in (*AXES, "expert") if mesh.size(axis) > 1]
    rows = training.global_batch_size // mesh.size("data")
    console.print(
        shown(title, "bold"),
        f", {count(found.parameters)} parameters, on {mesh.world:,} "
        f"rank{'s' * (mesh.world > 1)}{': ' * bool(degrees)}{' x '.join(degrees)}\n"
        f"global batch {training.global_batch_size:,} rows of {training.sequence_length:,} tokens; per data-parallel "
        f"rank {rows:,} rows, {found.microbatches:,} micro-batches; {training.dtype}, recompute {training.recompute}\n",
        sep="",
        soft_wrap=True,
    )
    console.print(tabulate({f"memory of rank {largest.rank}, the largest": describe_memory(largest)}))
    if largest.traffic:
        console.print(tabulate({f"received by rank {largest.rank} per step": describe_traffic(largest)}))
    if mesh.size("pipeline") > 1:
        console.print(pipeline_table(found))
        console.print(
            f"bubble: {found.timeline.bubble:.1%} of the step, {mesh.parallel.pipeline_schedule} with "
            f"{found.microbatches} micro-batches\n"
        )
    console.print(tabulate({"FLOPs per step, forward and backward": describe_flops(found, training.dtype, gpu)}))


def describe_memory(rank: RankEstimate) -> dict[str, str]:
    memory = rank.memory
    return {
        "parameters": f"{size(memory.parameters)}   {rank.parameters:,} parameters",
        "gradients": size(memory.gradients),
        "optimizer state": size(memory.optimizer_state),
        "unsharded parameters": f"{size(memory.unsharded_parameters)}   estimate",
        "activations": f"{size(memory.activations)}   estimate",
        "workspace": f"{size(memory.workspace)}   estimate",
        "total": size(memory.total)
        + ("" if memory.accumulates else "   gradients are allocated as activations are freed"),
    }


def describe_traffic(rank: RankEstimate) -> dict[str, str]:
    return {kind: size(number) for kind, number in rank.traffic.items()}


def pipeline_table(found: Estimate) -> Table:
    """One line for each pipeline rank."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for heading in ("pipeline", "first rank", "layers", "parameters", "activations", "total"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, rank in enumerate(found.ranks):
        memory = rank.memory
        table.add_row(
            str(index), f"{rank.rank:,}", str(rank.layers), count(rank.parameters),
            size(memory.activations), size(memory.total),
        )  # fmt: skip
    return table


def describe_flops(found: Estimate, dtype: str, gpu: str) -> dict[str, str]:
    step = found.matmul_flops + found.causal_flops
    peak = GPU_PEAKS[gpu][dtype == "bfloat16"] * found.mesh.world
    seconds = step / peak / (1 - found.timeline.bubble)
    return {
        "matrix multiplications": flops(found.matmul_flops),
        "attention, at most": f"{flops(found.causal_flops)}   if each row is one causal document",
        f"shortest step on {gpu}": f"{seconds:.3g} s   at its peak of {peak / found.mesh.world / 1e12:.4g} TFLOP/s"
        + (", with the bubble" if found.timeline.bubble else ""),
    }


def show_context(console: Console, title: str, run: Run, found: Estimate, rows: int, picture: Path | None) -> None:
    """Print work and received keys of the recipe's data in every order, for the run's context degree and for others."""
    model, masks = read_masks(title, run, rows)
    layers = {name: model.attention_shape(name)[0] for name in masks}
    length, training = run.training.sequence_length, run.training
    micro_batch_size = training.rows_per_forward(training.global_batch_size // found.mesh.size("data"))
    degrees = dict.fromkeys((run.parallel.context, *(d for d in DEGREES if length % d == 0)))
    table = Table(box=None, padding=(0, 2), header_style="bold")
    keys = [heading for name in masks for heading in (f"{name} keys", "at least")]
    for heading in ("context", "order", "max/mean work", *keys, "bytes/step"):
        table.add_column(heading, justify="right")
    far: list[str] = []  # degrees whose balanced plan is far from the lower bound
    for degree in degrees:
        for order in ORDERS:
            plan = plan_context(masks, degree, order, layers=layers, balance=run.parallel.context_balance)
            fractions = {name: received_fraction(plan, name) for name in masks}
            least = {name: least_fraction(plan, name) for name in masks}
            if order == "balanced" and any(fractions[name] > FAR * least[name] for name in masks):
                far.append(str(degree))
            received_bytes = 2 * sum(  # keys in the forward, their gradients in the backward
                fraction * found.key_bytes.get(name, 0.0) * length * (degree - 1) / degree * micro_batch_size
                for name, fraction in fractions.items()
            )
            table.add_row(
                str(degree), order, f"{work_imbalance(plan, layers):.3f}",
                *(cell for name in masks for cell in (f"{fractions[name]:.1%}", f"{least[name]:.1%}")),
                size(received_bytes * found.microbatches),
            )  # fmt: skip
    rows = len(next(iter(masks.values())).start)
    console.print(
        f"[bold]context parallelism[/bold] of {rows} rows of {length:,} tokens of ", shown(run.data.source),
        CONTEXT_LEGEND.format(run.parallel.context_balance), sep="", soft_wrap=True,
    )  # fmt: skip
    console.print(table)
    if far:
        console.print(FAR_LEGEND.format(", ".join(far)), soft_wrap=True)
    if picture:
        with writing(picture):
            parallel = run.parallel
            plan = plan_context(
                masks, parallel.context, parallel.context_order, layers=layers, balance=parallel.context_balance
            )
            plot_context_plan(plan, picture)


def read_masks(title: str, run: Run, rows: int) -> tuple[Any, dict[str, AttentionMask]]:
    """The model, and the masks of its decoder for the first rows of its data."""
    training = replace(run.training, global_batch_size=rows, micro_batch_size=rows)
    source = first_batch(title, replace(run, training=training), None, None)
    assert source.model is not None, "a recipe has a model"
    used = {str(layer.mask_name) for layer in source.model.layers.values()}
    return source.model, {name: mask for name, mask in source.masks.items() if name in used}


def received_fraction(plan: ContextPlan, name: str) -> float:
    """Keys of one mask that all ranks receive, as a fraction of those in an all-gather."""
    transfers = plan.transfers[name]
    remote = transfers.source != transfers.target
    rows, length = plan.shape
    return float(np.sum(transfers.length[remote])) / max(1, rows * length * (plan.degree - 1))


def least_fraction(plan: ContextPlan, name: str) -> float:
    """Lower bound of the keys of one mask that all ranks receive, as a fraction of those in an all-gather."""
    rows, length = plan.shape
    return plan.least_keys(name) / max(1, rows * length * (plan.degree - 1))


def work_imbalance(plan: ContextPlan, layers: dict[str, int]) -> float:
    """Visible pairs of all layers: maximum over ranks / mean."""
    pairs = sum(layers[name] * (mask.stop - mask.start).sum(dim=2) for name, mask in plan.masks.items())
    assert isinstance(pairs, torch.Tensor)
    work = np.array([int(pairs.gather(1, plan.queries(rank)).sum()) for rank in range(plan.degree)])
    return float(work.max() / work.mean()) if work.any() else 1.0
