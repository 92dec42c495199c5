"""Stages of a pipeline: where a model is cut, which process has which stage, and which batches a schedule takes."""

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
"""Schedules under which each process has one stage; under the others it has two."""
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")
"""Schedules that place the stages down the processes and up again; the others begin anew at the first process."""
SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
"""Schedules that compute the gradients of the weights apart from those of the activations, to fill waiting with."""


def stages_of(parallel: ParallelConfig, process: int) -> list[int]:
    """The stages of a process, in the order of the model.

    Of 6 stages on 3 processes: 0 1 2 0 1 2, or under a V-shaped schedule 0 1 2 2 1 0.
    """
    n = parallel.pipeline
    if parallel.pipeline_schedule in ONE_STAGE:
        return [process]
    return [process, 2 * n - 1 - process if parallel.pipeline_schedule in V_SHAPED else n + process]


def count_stages(parallel: ParallelConfig) -> int:
    """Stages of the whole pipeline."""
    return parallel.pipeline * len(stages_of(parallel, 0))


def stage_owners(parallel: ParallelConfig) -> list[int]:
    """The process of each stage."""
    held = {stage: process for process in range(parallel.pipeline) for stage in stages_of(parallel, process)}
    return [held[stage] for stage in range(len(held))]


def split_stages(full_model: Decoder, stages: int) -> list[range]:
    """The layers of each stage: every stage at least one, the busiest with as little work as can be.

    Work is what a token takes in matrix products. So the embedding, which is only looked up, counts nothing, and the
    output projection as many layers as it is larger than one: with a vocabulary of 128k and a width of 4096 it is worth
    2.4 layers of Llama 3 8B, and the last stage has that many fewer. Attention's scores are left out.

    Errors: ValueError for more stages than layers.
    """
    if stages > len(full_model.layers):
        raise ValueError(
            f"{stages} pipeline stages need as many layers, and the model has {len(full_model.layers)}; expected at most "
            f"{len(full_model.layers)} stages: --parallel.pipeline times one with the schedules {' and '.join(ONE_STAGE)}, "
            "times two with the others"
        )
    total = list(accumulate((flops_per_token(layer) for layer in full_model.layers.values()), initial=0.0))
    end = len(full_model.layers)
    layers = total[-1]
    head = full_model.output_flops_per_token()
    before = sum(
        flops_per_token(part) for name, part in full_model.named_children() if name not in ("layers", "output")
    )

    @cache
    def best(first: int, left: int) -> tuple[float, float, tuple[int, ...]]:
        """For `left` stages from layer `first` on: the most work of one, the sum of squares, where each begins."""
        here = before if first == 0 else 0.0
        if left == 1:
            work = here + layers - total[first] + head
            return work, work**2, (first,)
        choices = []
        for stop in range(first + 1, end - left + 2):
            work = here + total[stop] - total[first]
            most, squares, begins = best(stop, left - 1)
            choices.append((max(work, most), work**2 + squares, (first, *begins)))
        return min(choices)

    begins = best(0, stages)[2]
    return [range(first, stop) for first, stop in zip(begins, (*begins[1:], end), strict=True)]


def build_local_stages(full_model: Decoder, mesh: Mesh) -> list[Decoder]:
    """This process's stages of a skeleton: copies without the parts that lie elsewhere, whose names are as they were.

    Errors: ValueError for more stages than layers, and for a model whose ends cannot be parted.
    """
    if mesh.size("pipeline") == 1:
        return [deepcopy(full_model)]
    check_pipeline_support(full_model)
    parallel = mesh.parallel
    ranges = split_stages(full_model, count_stages(parallel))
    return [
        extract_stage(full_model, ranges[stage], first=stage == 0, last=stage == len(ranges) - 1)
        for stage in stages_of(parallel, mesh.index("pipeline"))
    ]


def check_pipeline_support(full_model: Decoder) -> None:
    """Refuse a model that needs its embedding where its head is."""
    if full_model.pipeline_unsupported_reason:
        raise ValueError(
            f"{full_model.pipeline_unsupported_reason}, or --parallel.pipeline 1: a pipeline has the embedding on its first process and "
            "the output projection on its last"
        )


def extract_stage(full_model: Decoder, layers: range, *, first: bool, last: bool) -> Decoder:
    """A copy of a skeleton with these layers alone; first and last: also with what stands before and behind them."""
    stage: Any = deepcopy(full_model)
    for index, name in enumerate(full_model.layers):
        if index not in layers:
            del stage.layers[name]
    for name, part in list(stage.named_children()):
        behind = name in ("norm", "output")
        if part is not stage.layers and not (last if behind else first):
            setattr(stage, name, None)
    return stage


def count_microbatches(parallel: ParallelConfig, training: TrainingConfig, rows: int) -> int:
    """Microbatches that a process's `rows` of a step are cut into.

    Errors: ValueError where they cannot be, or the schedule does not work with that many; it names sizes that work.
    """
    size, schedule, processes = training.micro_batch_size, parallel.pipeline_schedule, parallel.pipeline
    check_split_backward(parallel, training)
    fits, wanted = valid_microbatch_counts(parallel)
    if rows % size == 0 and fits(rows // size):
        return rows // size
    sizes = [n for n in divisors(rows) if fits(rows // n)]
    enough = next(n for n in range(1, 2 * processes + 1) if fits(n)) * size
    remedy = f"--training.micro-batch-size {nearest(size, sizes)}"
    if not sizes:
        remedy = f"--training.global-batch-size {enough * training.global_batch_size // rows}"
    raise ValueError(
        f"training.micro-batch-size {size} cuts the {rows} rows of a process into "
        f"{rows // size if rows % size == 0 else 'unequal'} microbatches, but {schedule} on {processes} processes "
        f"takes {wanted}; use {remedy}"
    )


def check_split_backward(parallel: ParallelConfig, training: TrainingConfig) -> None:
    """Refuse what goes through a layer's backward only once, where it is gone through twice."""
    if parallel.pipeline_schedule not in SPLIT_BACKWARD:
        return
    came = "training.compile" if training.compile else "training.recompute selective"
    remedy = "--training.no-compile" if training.compile else "--training.recompute full"
    if training.compile or training.recompute == "selective":
        raise ValueError(
            f"parallel.pipeline-schedule {parallel.pipeline_schedule} computes the gradients of the weights apart from "
            f"the others, which layers under {came} cannot; use {remedy}, or one of the schedules 1F1B, GPipe, "
            "Interleaved1F1B, LoopedBFS"
        )


def valid_microbatch_counts(parallel: ParallelConfig) -> tuple[Callable[[int], bool], str]:
    """Whether the schedule works with a number of microbatches, and which numbers those are in words."""
    n = parallel.pipeline
    match parallel.pipeline_schedule:
        case "1F1B":
            return lambda count: count >= n, f"at least {n} equal ones, one for each process"
        case "DualPipeV":
            return lambda count: count >= 2 * n, f"at least {2 * n} equal ones, one for each stage"
        case "Interleaved1F1B" | "InterleavedZeroBubble":
            in_words = f"equal ones in equal rounds of {n} or more: a multiple of {n} always"
            return lambda count: count % max(1, count // n) == 0, in_words
        case _:
            return lambda count: True, "equal ones"
