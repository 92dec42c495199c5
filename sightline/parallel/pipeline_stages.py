"""Pipeline stages: how a model is split, which rank has which stage, and which batch sizes a schedule supports."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from itertools import accumulate
from typing import Any

from sightline.config import ParallelConfig, TrainingConfig
from sightline.layers import flops_per_token
from sightline.models.decoder import Decoder
from sightline.numbers import divisors, nearest
from sightline.parallel.mesh import Mesh

ONE_STAGE = ("GPipe", "1F1B")
"""Schedules with one stage per rank; all others have two."""
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
"""Schedules that assign stages to ranks 0 1 2 2 1 0; other schedules with two stages per rank use 0 1 2 0 1 2."""
SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
"""Schedules that compute weight gradients separately from input gradients, to fill pipeline bubbles."""


def stages_of(parallel: ParallelConfig, rank: int) -> list[int]:
    """Return the stages of a pipeline rank, in the order of the model.

    With 6 stages on 3 ranks, rank 0 has stages [0, 3], or [0, 5] under a V-shaped schedule.
    """
    n = parallel.pipeline
    if parallel.pipeline_schedule in ONE_STAGE:
        return [rank]
    return [rank, 2 * n - 1 - rank if parallel.pipeline_schedule in V_SHAPED else n + rank]


def count_stages(parallel: ParallelConfig) -> int:
    """Return the number of stages of all pipeline ranks."""
    return parallel.pipeline * len(stages_of(parallel, 0))


def stage_owners(parallel: ParallelConfig) -> list[int]:
    """Return the pipeline rank of each stage."""
    owners = {stage: rank for rank in range(parallel.pipeline) for stage in stages_of(parallel, rank)}
    return [owners[stage] for stage in range(len(owners))]


def split_stages(full_model: Decoder, stages: int) -> list[range]:
    """Return the layers of each stage, at least one, such that the slowest stage has the least work.

    Work is measured as FLOPs per token in matrix products, without attention scores. The embedding is a lookup and
    costs nothing. The output projection of Llama 3 8B (vocabulary 128k, hidden size 4096) costs as much as 2.4 layers,
    so the last stage gets fewer layers.
    """
    assert stages <= len(full_model.layers), "check_pipeline checks the number of stages"
    total = list(accumulate((flops_per_token(layer) for layer in full_model.layers.values()), initial=0.0))
    end = len(full_model.layers)
    head = full_model.output_flops_per_token()
    before = sum(
        flops_per_token(part) for name, part in full_model.named_children() if name not in ("layers", "output")
    )

    @cache
    def best(first: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """Split the layers from `first` into `left` stages: (most work of one, sum of squared work, first layers)."""
        here = before if first == 0 else 0.0
        if left == 1:
            work = here + total[-1] - total[first] + head
            return work, work**2, (first,)
        choices = []
        for stop in range(first + 1, end - left + 2):
            work = here + total[stop] - total[first]
            most, squares, starts = best(stop, left - 1)
            choices.append((max(work, most), work**2 + squares, (first, *starts)))
        return min(choices)

    starts = best(0, stages)[2]
    return [range(first, stop) for first, stop in zip(starts, (*starts[1:], end), strict=True)]


def build_local_stages(full_model: Decoder, mesh: Mesh) -> list[Decoder]:
    """Return this rank's stages of a model on the meta device: copies without the remote modules, names unchanged."""
    if mesh.size("pipeline") == 1:
        return [deepcopy(full_model)]
    parallel = mesh.parallel
    ranges = split_stages(full_model, count_stages(parallel))
    return [
        extract_stage(full_model, ranges[stage], first=stage == 0, last=stage == len(ranges) - 1)
        for stage in stages_of(parallel, mesh.index("pipeline"))
    ]


def check_pipeline(full_model: Decoder, parallel: ParallelConfig) -> None:
    """Check that the model can be split into the stages of `parallel`.

    Raises:
        ValueError: if there are more stages than layers, or if embedding and head must be on one stage.
    """
    if parallel.pipeline == 1:
        return
    stages, layers = count_stages(parallel), len(full_model.layers)
    if stages > layers:
        raise ValueError(
            f"{stages} pipeline stages need at least {stages} layers, but the model has {layers}; use at most {layers} "
            f"stages: --parallel.pipeline times one with the schedules {' and '.join(ONE_STAGE)}, times two with the "
            "others"
        )
    if full_model.pipeline_unsupported_reason:
        raise ValueError(
            f"{full_model.pipeline_unsupported_reason}, or --parallel.pipeline 1: a pipeline has the embedding on its "
            "first stage and the output projection on its last"
        )


def extract_stage(full_model: Decoder, layers: range, *, first: bool, last: bool) -> Decoder:
    """Copy a model on the meta device with these layers only. The first stage also has the modules before the layers,
    the last stage the modules after them."""
    stage: Any = deepcopy(full_model)
    for index, name in enumerate(full_model.layers):
        if index not in layers:
            del stage.layers[name]
    for name, part in list(stage.named_children()):
        after = name in ("norm", "output")
        if part is not stage.layers and not (last if after else first):
            setattr(stage, name, None)
    return stage


def count_microbatches(parallel: ParallelConfig, training: TrainingConfig, rows: int) -> int:
    """Return the number of micro-batches for the `rows` of one data rank in a step.

    Raises:
        ValueError: if the rows cannot be split evenly, or the schedule does not support their number of micro-batches;
            the message names valid sizes.
    """
    size, schedule, ranks = training.rows_per_forward(rows), parallel.pipeline_schedule, parallel.pipeline
    check_split_backward(parallel, training)
    is_valid, expected = valid_microbatch_counts(parallel)
    if rows % size == 0 and is_valid(rows // size):
        return rows // size
    sizes = [n for n in divisors(rows) if is_valid(rows // n)]
    enough = next(n for n in range(1, 2 * ranks + 1) if is_valid(n)) * size
    remedy = f"--training.micro-batch-size {nearest(size, sizes)}"
    if not sizes:
        remedy = f"--training.global-batch-size {enough * training.global_batch_size // rows}"
    raise ValueError(
        f"training.micro-batch-size {training.micro_batch_size} splits the {rows} rows of a data rank into "
        f"{'unequal' if rows % size else rows // size} micro-batch{'' if rows == size else 'es'}, but {schedule} on "
        f"{ranks} pipeline ranks requires {expected}; use {remedy}"
    )


def check_split_backward(parallel: ParallelConfig, training: TrainingConfig) -> None:
    """Check that a schedule with split backward is not combined with torch.compile or selective recomputation.

    These allow only one backward through a layer, while the schedule makes two.

    Raises:
        ValueError: if it is.
    """
    if parallel.pipeline_schedule not in SPLIT_BACKWARD:
        return
    option = "training.compile" if training.compile else "training.recompute selective"
    remedy = "--training.no-compile" if training.compile else "--training.recompute full"
    if training.compile or training.recompute == "selective":
        raise ValueError(
            f"parallel.pipeline-schedule {parallel.pipeline_schedule} computes weight gradients separately from "
            f"input gradients, which {option} does not support; use {remedy}, or one of the schedules 1F1B, GPipe, "
            "Interleaved1F1B, LoopedBFS"
        )


def valid_microbatch_counts(parallel: ParallelConfig) -> tuple[Callable[[int], bool], str]:
    """Return a predicate of the micro-batch counts that the schedule supports, and a description of these counts."""
    n = parallel.pipeline
    match parallel.pipeline_schedule:
        case "1F1B":
            return lambda count: count >= n, f"at least {n} equal ones, one per rank"
        case "DualPipeV":
            return lambda count: count >= 2 * n, f"at least {2 * n} equal ones, one per stage"
        case "Interleaved1F1B" | "InterleavedZeroBubble":
            text = f"equal ones in equal rounds of at least {n} (any multiple of {n} is valid)"
            return lambda count: count % max(1, count // n) == 0, text
        case _:
            return lambda count: True, "equal ones"
