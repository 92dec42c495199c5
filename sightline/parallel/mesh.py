"""The device mesh: degrees, axes and process groups of all parallelisms."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sightline.config import ParallelConfig
from sightline.numbers import divisors
from sightline.parallel.torch_private import flatten, set_timeout

AXES = ("pipeline", "replicate", "shard", "context", "tensor")
"""Outermost first: neighbors along the last axis have adjacent ranks, which have the fastest links."""
FLATTENED = {"data": ("replicate", "shard"), "weights": ("shard", "context"), "loss": ("replicate", "shard", "context")}
"""data: ranks with different rows; weights: ranks that share one copy of the weights; loss: ranks whose token losses
sum to the loss of all rows."""
MAX_LISTED_RANKS = 64
"""Ranks of a pipeline stage up to which the log lists all of them."""


def resolve(parallel: ParallelConfig, world: int) -> ParallelConfig:
    """Return the degrees with shard -1 replaced by `world` / (the product of the others).

    Raises:
        ValueError: if the degrees do not multiply to `world`, or expert does not divide shard x context; the message
            names valid degrees.
    """
    others = {axis: getattr(parallel, axis) for axis in AXES if axis != "shard"}
    product = math.prod(others.values())
    named = " x ".join(f"{axis} {degree}" for axis, degree in others.items() if degree > 1) or "the other degrees' 1"
    if parallel.shard == -1:
        if world % product:
            raise ValueError(
                f"{named} is {product}, which does not divide the {world} processes started; "
                f"{describe_valid_degrees(others, world)}, or start a multiple of {product} processes"
            )
        parallel = replace(parallel, shard=world // product)
    elif product * parallel.shard != world:
        remedy = f"use shard {world // product}" if world % product == 0 else describe_valid_degrees(others, world)
        raise ValueError(
            f"{named} with shard {parallel.shard} needs {product * parallel.shard} processes, but {world} were "
            f"started; {remedy}, or torchrun --nproc-per-node {product * parallel.shard}"
        )
    ranks = parallel.shard * parallel.context
    if ranks % parallel.expert:
        raise ValueError(
            f"parallel.expert {parallel.expert} does not divide shard {parallel.shard} x context {parallel.context} = "
            f"{ranks}, the ranks that share the experts; degrees that do: {divisors(ranks)}"
        )
    return parallel


def describe_valid_degrees(degrees: dict[str, int], world: int) -> str:
    """Return the remedy as text: the valid values of each degree above 1 if the other degrees stay unchanged."""
    product = math.prod(degrees.values())
    choices = []
    for axis, degree in degrees.items():
        if degree > 1:
            free = world // (product // degree) if world % (product // degree) == 0 else 0
            if free:
                choices.append(f"{axis} {' or '.join(map(str, divisors(free)))}")
    return "use one of: " + "; ".join(choices) if choices else "lower several degrees"


def collective_timeout(parallel: ParallelConfig, device: torch.device) -> timedelta:
    """Return the time after which a collective fails: `parallel.timeout`, and on GPUs half a minute more.

    NCCL then kills the process, which by then has found the missing rank; see `wait_for_device`.
    """
    return timedelta(seconds=parallel.timeout + (30 if device.type == "cuda" else 0))


class Degrees:
    """Number of ranks along each axis, which needs no process groups.

    An axis is one of AXES or FLATTENED, `expert` (the ranks that share a layer's experts, neighbors in shard x context)
    or `expert_weights` (the ranks that store the same experts and share their weights).

    Raises:
        ValueError: if `world` ranks cannot have these degrees; see `resolve`.
    """

    def __init__(self, parallel: ParallelConfig, world: int) -> None:
        self.world, self.parallel = world, resolve(parallel, world)
        self._sizes = {axis: getattr(self.parallel, axis) for axis in AXES}
        self._sizes |= {name: math.prod(self._sizes[axis] for axis in axes) for name, axes in FLATTENED.items()}
        self._sizes["expert"] = self.parallel.expert
        self._sizes["expert_weights"] = self._sizes["weights"] // self.parallel.expert

    def size(self, axis: str) -> int:
        """Return the number of ranks along an axis."""
        return self._sizes[axis]


class Mesh(Degrees):
    """Degrees, and this rank's indices, process groups and device meshes of all axes.

    A single process has no process groups: every axis has size 1. Otherwise torch.distributed must be initialized.
    """

    def __init__(self, parallel: ParallelConfig, device: torch.device) -> None:
        super().__init__(parallel, dist.get_world_size() if dist.is_initialized() else 1)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.device = device
        self._roots: list[DeviceMesh] = []
        self._flattened: dict[str, DeviceMesh] = {}
        if self.world > 1:
            # A tensor sharded along several axes needs them in one root mesh, so there is one root per combination.
            self._roots = [self._lay_out("pipeline", "replicate", "weights", "tensor"), self._lay_out(*AXES)]
            self._flattened = {
                name: flatten(self._roots[1][axes]) for name, axes in FLATTENED.items() if name != "weights"
            }
        if self.parallel.expert > 1:
            self._roots.append(self._lay_out("pipeline", "replicate", "expert_weights", "expert", "tensor"))
        if self.world > 1 and dist.get_backend() != "fake":
            for mesh in [*self._roots, *self._flattened.values()]:
                for group in mesh.get_all_groups():
                    set_timeout(collective_timeout(self.parallel, device), group)

    def _lay_out(self, *axes: str) -> DeviceMesh:
        return init_device_mesh(self.device.type, tuple(self._sizes[axis] for axis in axes), mesh_dim_names=axes)

    def index(self, axis: str) -> int:
        """Return this rank's index along an axis, from 0."""
        return self[axis].get_local_rank() if self.world > 1 and self._sizes[axis] > 1 else 0

    def group(self, axis: str) -> dist.ProcessGroup:
        """Return the process group of an axis."""
        return self[axis].get_group()

    def __getitem__(self, axes: str | tuple[str, ...]) -> DeviceMesh:
        """Return the DeviceMesh of one or several axes."""
        assert self._roots, "one process has no mesh: ask for the size of the axis first"
        names = (axes,) if isinstance(axes, str) else axes
        if names[0] in self._flattened:
            return self._flattened[names[0]]
        root = next(root for root in self._roots if set(names) <= set(root.mesh_dim_names or ()))
        return root[names]

    def describe_layout(self) -> dict[str, str]:
        """Return the rank layout as text for the log: the degrees, then the ranks of each pipeline stage.

        `0+1 2+3 | 4+5 6+7`: tensor neighbors are joined by a plus, context ranks by a space, data ranks by a bar.
        """
        degrees = [f"{axis} {self._sizes[axis]}" for axis in AXES if self._sizes[axis] > 1]
        if self.parallel.expert > 1:
            degrees.append(f"expert {self.parallel.expert} of shard x context")
        layout = {"mesh": " x ".join(degrees) or "one process"}
        ranks = torch.arange(self.world).view([self._sizes[axis] for axis in AXES]).flatten(1, 2)
        for stage, rows in enumerate(ranks):  # each [data, context, tensor]
            cells = [" ".join("+".join(map(str, part.tolist())) for part in row) for row in rows]
            if rows.numel() > MAX_LISTED_RANKS:
                cells = [cells[0], "...", cells[-1]]
            layout[f"stage {stage}" if len(ranks) > 1 else "ranks"] = " | ".join(cells)
        return layout

    def all_reduce(self, value: torch.Tensor, axis: str) -> torch.Tensor:
        """Sum `value` over an axis in place, and return it."""
        if self._sizes[axis] > 1:
            dist.all_reduce(value, group=self.group(axis))
        return value
