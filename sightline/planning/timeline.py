"""When each process of a pipeline works and when it waits, and how many microbatches it holds meanwhile.

Schedules of several stages are PyTorch's own. Time is counted in forwards of a microbatch through a stage; a backward
takes two, one for the activations and one for the weights.
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
"""Kind (F forward, B backward, I and W its halves), stage, microbatch."""
DURATION = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


@dataclass(frozen=True)
class Timeline:
    """A step of a pipeline.

    bubble  share of the processes' time in which they wait
    held    the greatest number of microbatches, by stage, that a process holds activations of at one time
    """

    bubble: float
    in_flight: list[dict[int, int]]


def timeline(parallel: ParallelConfig, microbatches: int) -> Timeline:
    """Of a schedule on parallel.pipeline processes, all stages being equally long and messages taking no time."""
    orders = tasks(parallel, microbatches)
    last = count_stages(parallel) - 1
    ended: dict[Task, float] = {}
    clock, at = [0.0] * len(orders), [0] * len(orders)
    while any(place < len(order) for place, order in zip(at, orders, strict=True)):
        before = list(at)
        for process, order in enumerate(orders):
            while at[process] < len(order):
                task = order[at[process]]
                ready = _ready(task, ended, last)
                if ready is None:
                    break
                clock[process] = ended[task] = max(clock[process], ready) + DURATION[task[0]]
                at[process] += 1
        assert at != before, "a schedule of PyTorch comes to its end"
    work = [sum(DURATION[task[0]] for task in order) for order in orders]
    return Timeline(1 - sum(work) / (len(orders) * max(clock)), [_in_flight(order) for order in orders])


def tasks(parallel: ParallelConfig, microbatches: int) -> list[list[Task]]:
    """What each process does, in order."""
    if parallel.pipeline_schedule in ONE_STAGE:
        return [_one_stage(parallel, process, microbatches) for process in range(parallel.pipeline)]
    with fake_process_group(parallel.pipeline, 0):
        hidden = torch.empty(1, device="meta", requires_grad=True)
        count, cpu = count_stages(parallel), torch.device("cpu")
        shapes: dict[str, Any] = {"input_args": hidden, "output_args": hidden, "group": dist.group.WORLD}
        stages = [PipelineStage(nn.Identity(), index, count, cpu, **shapes) for index in stages_of(parallel, 0)]
        kind: Any = get_schedule_class(parallel.pipeline_schedule)
        order = kind(stages, microbatches, loss_fn=lambda loss, labels: loss).pipeline_order
    return [_plain(order[process]) for process in range(parallel.pipeline)]


def _one_stage(parallel: ParallelConfig, process: int, microbatches: int) -> list[Task]:
    """GPipe: all forwards, then all backwards. 1F1B: as many forwards as there are processes from here on, then a
    backward for each forward."""
    ahead = microbatches
    if parallel.pipeline_schedule == "1F1B":
        ahead = min(microbatches, parallel.pipeline - process)
    order: list[Task] = [("F", process, microbatch) for microbatch in range(ahead)]
    for microbatch in range(microbatches):
        order.append(("B", process, microbatch))
        if microbatch + ahead < microbatches:
            order.append(("F", process, microbatch + ahead))
    return order


def _plain(actions: list[Any]) -> list[Task]:
    """Of a schedule's actions those that compute."""
    plain: list[Task] = []
    for action in actions:
        for part in () if action is None else action.sub_actions or (action,):
            if part.computation_type.value in DURATION:
                plain.append((part.computation_type.value, part.stage_index, part.microbatch_index))
    return plain


def _ready(task: Task, ended: dict[Task, float], last: int) -> float | None:
    """When what a task waits for has come; None if that is not known yet."""
    kind, stage, microbatch = task
    if kind == "W":
        return 0.0  # its other half stands before it in the same process
    if kind == "F":
        return 0.0 if stage == 0 else ended.get(("F", stage - 1, microbatch))
    if stage == last:
        return ended.get(("F", stage, microbatch))
    whole = ended.get(("B", stage + 1, microbatch))
    return ended.get(("I", stage + 1, microbatch)) if whole is None else whole


def _in_flight(order: list[Task]) -> dict[int, int]:
    """Microbatches in flight, by stage, when there are most of them. One leaves with its gradients of the weights."""
    now: dict[int, int] = dict.fromkeys(sorted({stage for _, stage, _ in order}), 0)
    most = dict(now)
    for kind, stage, _ in order:
        now[stage] += {"F": 1, "I": 0}.get(kind, -1)
        if sum(now.values()) > sum(most.values()):
            most = dict(now)
    return most
