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
from sightline.planning.estimate import Estimate, ProcessEstimate, estimate
from sightline.plots.context_png import plot_context_plan
from sightline.training.flops import GPU_PEAKS

DEGREES = (8, 64, 512)
"""Degrees of `context` that are shown beside the run's own."""


def show_plan(title: str, run: Run, *, processes: int, gpu: str, rows: int, picture: Path | None) -> None:
    """Print what `run` needs on `processes` processes, or on the product of its degrees where that is 0."""
    world = processes or math.prod(max(1, getattr(run.parallel, axis)) for axis in AXES)
    console = Console(highlight=False)
    with Console(stderr=True).status("counting"):
        found = estimate(run, world)
    show(console, title, run.training, found, gpu)
    if run.parallel.context > 1:
        show_context(console, title, run, found, rows, picture)


def show(console: Console, title: str, training: config.TrainingConfig, found: Estimate, gpu: str) -> None:
    """The tables, in the order in which they decide."""
    mesh, largest = found.mesh, found.largest
    named = [f"{axis} {mesh.size(axis)}" for axis in (*AXES, "expert") if mesh.size(axis) > 1]
    rows = training.global_batch_size // mesh.size("data")
    console.print(
        f"[bold]{title}[/bold], {count(found.parameters)} parameters, on {mesh.world:,} "
        f"process{'es' * (mesh.world > 1)}{': ' * bool(named)}{' x '.join(named)}\n"
        f"a step is {training.global_batch_size:,} rows of {training.sequence_length:,} tokens, {rows:,} a process in "
        f"{found.microbatches:,} forwards; {training.dtype}, recompute {training.recompute}\n",
        soft_wrap=True,
    )
    console.print(tabulate({f"memory of rank {largest.rank}, the largest": describe_memory(largest)}))
    if largest.traffic:
        console.print(tabulate({f"rank {largest.rank} receives in a step": describe_traffic(largest)}))
    if mesh.size("pipeline") > 1:
        console.print(stages_table(found))
        console.print(
            f"bubble: {found.timeline.bubble:.1%} of the time is waiting, {mesh.parallel.pipeline_schedule} with "
            f"{found.microbatches} microbatches\n"
        )
    console.print(tabulate({"a step's arithmetic, forward and backward": describe_flops(found, training.dtype, gpu)}))


def describe_memory(process: ProcessEstimate) -> dict[str, str]:
    memory = process.memory
    return {
        "weights": f"{size(memory.weights)}   {process.parameters:,} of the parameters",
        "gradients": size(memory.gradients),
        "moments": size(memory.optimizer_state),
        "weights gathered": f"{size(memory.unsharded_weights)}   about",
        "activations": f"{size(memory.activations)}   about",
        "at work": f"{size(memory.workspace)}   about",
        "together": size(memory.total) + ("" if memory.accumulates else "   gradients grow while activations go"),
    }


def describe_traffic(process: ProcessEstimate) -> dict[str, str]:
    return {kind: size(number) for kind, number in process.traffic.items()}


def stages_table(found: Estimate) -> Table:
    """A line for each process of the pipeline."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for heading in ("pipeline", "first rank", "layers", "parameters", "activations", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for index, process in enumerate(found.processes):
        memory = process.memory
        table.add_row(
            f"process {index}", f"{process.rank:,}", str(process.layers), count(process.parameters),
            size(memory.activations), size(memory.total),
        )  # fmt: skip
    return table


def describe_flops(found: Estimate, dtype: str, gpu: str) -> dict[str, str]:
    step = found.matmul_flops + found.causal_flops
    peak = GPU_PEAKS[gpu][dtype == "bfloat16"] * found.mesh.world
    seconds = step / peak / (1 - found.timeline.bubble)
    return {
        "matrix products": flops(found.matmul_flops),
        "attention, at most": f"{flops(found.causal_flops)}   were every row one document",
        f"shortest step on {gpu}": f"{seconds:.3g} s   at its peak of {peak / found.mesh.world / 1e12:.4g} TFLOP/s"
        + (", with the bubble" if found.timeline.bubble else ""),
    }


def show_context(console: Console, title: str, run: Run, found: Estimate, rows: int, picture: Path | None) -> None:
    """How the rows of the recipe's data are shared, for the run's degree and others, in every order."""
    model, masks = read_masks(title, run, rows)
    layers = {name: model.attention_shape(name)[0] for name in masks}
    length = run.training.sequence_length
    degrees = dict.fromkeys((run.parallel.context, *(d for d in DEGREES if length % d == 0)))
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for heading in ("context", "order", "work", *(f"{name} keys" for name in masks)):
        table.add_column(heading, justify="right")
    table.add_column("a step", justify="right")
    for degree in degrees:
        for order in ORDERS:
            plan = plan_context(masks, degree, order, layers=layers)
            shares = {name: received(plan, name) for name in masks}
            came = 2 * sum(  # keys, and on the way back their gradients
                share * found.key_bytes.get(name, 0.0) * length * (degree - 1) / degree * run.training.micro_batch_size
                for name, share in shares.items()
            )
            table.add_row(
                str(degree), order, f"{busiest(plan, layers):.3f}", *(f"{share:.1%}" for share in shares.values()),
                size(came * found.microbatches),
            )  # fmt: skip
    console.print(
        f"[bold]context parallelism[/bold] of {len(next(iter(masks.values())).start)} rows of {length:,} tokens of "
        f"{run.data.source}:\nwork is that of the busiest process as a multiple of the mean; keys are those received, "
        "as a share of what an\nall-gather brings (a ring moves as many); last what a process receives in all layers\n",
        soft_wrap=True,
    )
    console.print(table)
    if picture:
        with writing(picture):
            plan = plan_context(masks, run.parallel.context, run.parallel.context_order, layers=layers)
            plot_context_plan(plan, picture)


def read_masks(title: str, run: Run, rows: int) -> tuple[Any, dict[str, AttentionMask]]:
    """The model, and the masks of its decoder on the first rows of its data."""
    training = replace(run.training, global_batch_size=rows, micro_batch_size=rows)
    subject = first_batch(title, replace(run, training=training), None, None)
    assert subject.model is not None, "a recipe has a model"
    used = {str(layer.mask_name) for layer in subject.model.layers.values()}
    return subject.model, {name: mask for name, mask in subject.masks.items() if name in used}


def received(plan: ContextPlan, name: str) -> float:
    """Keys of one mask that all ranks receive, as a share of those that an all-gather brings."""
    transfers = plan.transfers[name]
    foreign = transfers.source != transfers.rank
    rows, length = plan.shape
    return float(np.sum(transfers.length[foreign])) / max(1, rows * length * (plan.degree - 1))


def busiest(plan: ContextPlan, layers: dict[str, int]) -> float:
    """Visible pairs of the busiest rank in all layers, as a multiple of the mean."""
    pairs = sum(layers[name] * (mask.stop - mask.start).sum(dim=2) for name, mask in plan.masks.items())
    assert isinstance(pairs, torch.Tensor)
    work = np.array([int(pairs.gather(1, plan.queries(rank)).sum()) for rank in range(plan.degree)])
    return float(work.max() / work.mean()) if work.any() else 1.0
