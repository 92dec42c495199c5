"""Bubble of a pipeline schedule, and micro-batches in flight on each pipeline rank.

Schedules with several stages per rank are those of PyTorch. The unit of time is the forward of a micro-batch through a
stage; a backward takes two units, one for the gradients of the activations and one for those of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from sightline.config import ParallelConfig
from sightline.parallel.pipeline_stages import ONE_STAGE, count_stages, stages_of
from sightline.planning.torch_private import fake_process_group

Task = tuple[str, int, int]
"""Kind (F forward, B backward, I and W its halves for inputs and weights), stage, micro-batch."""
DURATION = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


@dataclass(frozen=True)
class Timeline:
    """An optimizer step of a pipeline.

    bubble     fraction of the time in which ranks are idle
    in_flight  per pipeline rank, the micro-batches in flight in each of its stages when their sum is greatest
    """

    bubble: float
    in_flight: list[dict[int, int]]


def timeline(parallel: ParallelConfig, microbatches: int) -> Timeline:
    """Simulate the schedule on `parallel.pipeline` ranks, with stages of equal duration and sends that take no time."""
    orders = tasks(parallel, microbatches)
    last_stage = count_stages(parallel) - 1
    end_times: dict[Task, float] = {}
    clock, index = [0.0] * len(orders), [0] * len(orders)
    while any(i < len(order) for i, order in zip(index, orders, strict=True)):
        before = list(index)
        for rank, order in enumerate(orders):
            while index[rank] < len(order):
                task = order[index[rank]]
                start = _earliest_start(task, end_times, last_stage)
                if start is None:
                    break
                clock[rank] = end_times[task] = max(clock[rank], start) + DURATION[task[0]]
                index[rank] += 1
        assert index != before, "the schedule has a deadlock"
    work = [sum(DURATION[task[0]] for task in order) for order in orders]
    return Timeline(1 - sum(work) / (len(orders) * max(clock)), [_in_flight(order) for order in orders])


def tasks(parallel: ParallelConfig, microbatches: int) -> list[list[Task]]:
    """Tasks of each pipeline rank, in execution order."""
    if parallel.pipeline_schedule in ONE_STAGE:
        return [_one_stage(parallel, rank, microbatches) for rank in range(parallel.pipeline)]
    with fake_process_group(parallel.pipeline, 0):
        hidden = torch.empty(1, device="meta", requires_grad=True)
        count, cpu = count_stages(parallel), torch.device("cpu")
        shapes: dict[str, Any] = {"input_args": hidden, "output_args": hidden, "group": dist.group.WORLD}
        stages = [PipelineStage(nn.Identity(), index, count, cpu, **shapes) for index in stages_of(parallel, 0)]
        kind: Any = get_schedule_class(parallel.pipeline_schedule)
        order = kind(stages, microbatches, loss_fn=lambda loss, labels: loss).pipeline_order
    return [_compute_tasks(order[rank]) for rank in range(parallel.pipeline)]


def _one_stage(parallel: ParallelConfig, rank: int, microbatches: int) -> list[Task]:
    """Tasks of a pipeline rank with one stage.

    GPipe: all forwards, then all backwards. 1F1B: a warmup of one forward for this rank and for each rank after it,
    then backwards and forwards in turn.
    """
    warmup = microbatches
    if parallel.pipeline_schedule == "1F1B":
        warmup = min(microbatches, parallel.pipeline - rank)
    order: list[Task] = [("F", rank, microbatch) for microbatch in range(warmup)]
    for microbatch in range(microbatches):
        order.append(("B", rank, microbatch))
        if microbatch + warmup < microbatches:
            order.append(("F", rank, microbatch + warmup))
    return order


def _compute_tasks(actions: list[Any]) -> list[Task]:
    """Compute actions of a PyTorch schedule, without sends and receives."""
    compute: list[Task] = []
    for action in actions:
        for part in () if action is None else action.sub_actions or (action,):
            if part.computation_type.value in DURATION:
                compute.append((part.computation_type.value, part.stage_index, part.microbatch_index))
    return compute


def _earliest_start(task: Task, end_times: dict[Task, float], last_stage: int) -> float | None:
    """Time at which the inputs of a task are available; None if it is not known yet."""
    kind, stage, microbatch = task
    if kind == "W":
        return 0.0  # the I task before it on the same rank provides its inputs
    if kind == "F":
        return 0.0 if stage == 0 else end_times.get(("F", stage - 1, microbatch))
    if stage == last_stage:
        return end_times.get(("F", stage, microbatch))
    full_backward = end_times.get(("B", stage + 1, microbatch))
    return end_times.get(("I", stage + 1, microbatch)) if full_backward is None else full_backward


def _in_flight(order: list[Task]) -> dict[int, int]:
    """Micro-batches in flight in each stage when their sum is greatest; they last until their weight gradients."""
    now: dict[int, int] = dict.fromkeys(sorted({stage for _, stage, _ in order}), 0)
    most = dict(now)
    for kind, stage, _ in order:
        now[stage] += {"F": 1, "I": 0}.get(kind, -1)
        if sum(now.values()) > sum(most.values()):
            most = dict(now)
    return most
