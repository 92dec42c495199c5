"""The mesh: which process shares what with which others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sightline.config import ParallelConfig
from sightline.numbers import divisors
from sightline.parallel.torch_private import flatten

T = TypeVar("T")

AXES = ("pipeline", "replicate", "shard", "context", "tensor")
"""Outermost first: neighbours in the last axis have neighbouring ranks, and so the fastest links."""
FLATTENED = {"data": ("replicate", "shard"), "weights": ("shard", "context"), "loss": ("replicate", "shard", "context")}
"""data: processes with different rows; weights: those that share one copy of the weights; loss: those whose token
losses add up to the loss of all rows."""
SHOWN = 64
"""Ranks of a stage that the log names one by one."""


def resolve(parallel: ParallelConfig, world: int) -> ParallelConfig:
    """The degrees with shard's -1 replaced by what the others leave of `world` processes.

    Errors: ValueError where the degrees do not multiply to `world`, naming those that would; or where expert does not
    divide shard x context.
    """
    others = {axis: getattr(parallel, axis) for axis in AXES if axis != "shard"}
    product = math.prod(others.values())
    named = " x ".join(f"{axis} {degree}" for axis, degree in others.items() if degree > 1) or "the other degrees' 1"
    if parallel.shard == -1:
        if world % product:
            raise ValueError(
                f"{named} is {product}, which does not divide the {world} processes started; {describe_valid_degrees(others, world)}, "
                f"or start a multiple of {product} processes"
            )
        parallel = replace(parallel, shard=world // product)
    elif product * parallel.shard != world:
        remedy = f"shard {world // product}" if world % product == 0 else describe_valid_degrees(others, world)
        raise ValueError(
            f"{named} with shard {parallel.shard} needs {product * parallel.shard} processes, but {world} were "
            f"started; use {remedy}, or torchrun --nproc-per-node {product * parallel.shard}"
        )
    room = parallel.shard * parallel.context
    if room % parallel.expert:
        raise ValueError(
            f"parallel.expert {parallel.expert} does not divide shard {parallel.shard} x context {parallel.context} = "
            f"{room}, whose processes share the experts; degrees that do: {divisors(room)}"
        )
    return parallel


def describe_valid_degrees(degrees: dict[str, int], world: int) -> str:
    """Which value each degree above 1 could have instead."""
    product = math.prod(degrees.values())
    choices = []
    for axis, degree in degrees.items():
        if degree > 1:
            free = world // (product // degree) if world % (product // degree) == 0 else 0
            if free:
                choices.append(f"{axis} {' or '.join(map(str, divisors(free)))}")
    return "these would fit: " + "; ".join(choices) if choices else "lower several of them"


class Mesh:
    """This process's place among all processes, and its groups.

    One process has no groups: every axis has size 1. With more, torch.distributed must be running.

    An axis is one of AXES, of FLATTENED, `expert` (the processes among which a layer's experts are dealt out, neighbours
    in shard x context) or `expert_weights` (those that hold the same experts and share their weights).
    """

    def __init__(self, parallel: ParallelConfig, device: torch.device) -> None:
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.parallel = resolve(parallel, self.world)
        self.device = device
        self._sizes = {axis: getattr(self.parallel, axis) for axis in AXES}
        self._sizes |= {name: math.prod(self._sizes[axis] for axis in axes) for name, axes in FLATTENED.items()}
        self._sizes["expert"] = self.parallel.expert
        self._sizes["expert_weights"] = self._sizes["weights"] // self.parallel.expert
        self._roots: list[DeviceMesh] = []
        self._joined: dict[str, DeviceMesh] = {}
        if self.world > 1:
            # Tensors cut by several axes want these side by side in one mesh, so there is one for each way to cut.
            self._roots = [self._lay_out("pipeline", "replicate", "weights", "tensor"), self._lay_out(*AXES)]
            self._joined = {
                name: flatten(self._roots[1][axes]) for name, axes in FLATTENED.items() if name != "weights"
            }
        if self.parallel.expert > 1:
            self._roots.append(self._lay_out("pipeline", "replicate", "expert_weights", "expert", "tensor"))

    def _lay_out(self, *axes: str) -> DeviceMesh:
        return init_device_mesh(self.device.type, tuple(self._sizes[axis] for axis in axes), mesh_dim_names=axes)

    def size(self, axis: str) -> int:
        """Processes along an axis."""
        return self._sizes[axis]

    def index(self, axis: str) -> int:
        """This process's place among them, from 0."""
        return self[axis].get_local_rank() if self.world > 1 and self._sizes[axis] > 1 else 0

    def group(self, axis: str) -> dist.ProcessGroup:
        """The process group of an axis."""
        return self[axis].get_group()

    def __getitem__(self, axes: str | tuple[str, ...]) -> DeviceMesh:
        """The part of the mesh with these axes, for what torch.distributed applies over it."""
        assert self._roots, "one process has no mesh: ask for the size of the axis first"
        names = (axes,) if isinstance(axes, str) else axes
        if names[0] in self._joined:
            return self._joined[names[0]]
        root = next(root for root in self._roots if set(names) <= set(root.mesh_dim_names or ()))
        return root[names]

    def describe_layout(self) -> dict[str, str]:
        """Who is where, for the log: the degrees, then the ranks of each pipeline stage, all that have the same rows
        side by side: tensor neighbours joined by a plus, context ones by a space, data ranks by a bar."""
        several = [f"{axis} {self._sizes[axis]}" for axis in AXES if self._sizes[axis] > 1]
        if self.parallel.expert > 1:
            several.append(f"expert {self.parallel.expert} of shard x context")
        told = {"mesh": " x ".join(several) or "one process"}
        ranks = torch.arange(self.world).view([self._sizes[axis] for axis in AXES]).flatten(1, 2)
        for stage, rows in enumerate(ranks):  # each [data, context, tensor]
            cells = [" ".join("+".join(map(str, part.tolist())) for part in row) for row in rows]
            if rows.numel() > SHOWN:
                cells = [cells[0], "...", cells[-1]]
            told[f"stage {stage}" if len(ranks) > 1 else "ranks"] = " | ".join(cells)
        return told

    def from_rank_zero(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank 0, on every rank; an error of it is raised on all of them."""
        if self.world == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.rank == 0:
            try:
                outcome[0] = make()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, device=torch.device("cpu"))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def all_reduce(self, value: torch.Tensor, axis: str) -> torch.Tensor:
        """`value` added up over an axis, in place; the same on all its processes."""
        if self._sizes[axis] > 1:
            dist.all_reduce(value, group=self.group(axis))
        return value
