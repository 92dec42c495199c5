"""Expert parallelism: each process has some of a layer's experts, and tokens travel to the experts they have chosen."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Shard

from sightline.layers import Experts
from sightline.layers.precision import autocast_dtype
from sightline.models.decoder import Decoder
from sightline.numbers import divisors, nearest
from sightline.parallel.mesh import Mesh
from sightline.parallel.patch import expose_local_parameters, identity_view, replace_forward, replace_parameter
from sightline.parallel.torch_private import all_to_all_single_autograd


def apply_expert(model: Decoder, mesh: Mesh) -> None:
    """Deal out the experts of every layer among the processes of `expert`, in order, after tensor parallelism.

    The stacked weights [E, ...] become DTensors of which this process has E / degree; of each of them the part that
    tensor parallelism has left it. Their gradients add up the tokens of all processes of `expert`.
    """
    degree = mesh.size("expert")
    if degree == 1:
        return
    check_degree(model, mesh)
    group = mesh.group("expert")
    for experts in model.modules():
        if isinstance(experts, Experts):
            weights = dict(experts.named_parameters(recurse=False))
            for name, weight in weights.items():
                replace_parameter(experts, name, shard_experts(weight, mesh))
            if mesh.size("tensor") == 1:  # else tensor parallelism has said how the layer sees them
                expose_local_parameters(experts, **dict.fromkeys(weights, identity_view))
            replace_forward(experts, lambda run: functools.partial(dispatch, run, group))


def check_degree(model: Decoder, mesh: Mesh) -> None:
    """Refuse a model without experts, or with a number of them that the degree does not divide."""
    degree, family = mesh.size("expert"), type(model).__name__
    if not model.num_experts:
        raise ValueError(f"parallel.expert {degree}: {family} has no experts with these sizes; use parallel.expert 1")
    if model.num_experts % degree:
        fits = [d for d in divisors(model.num_experts) if mesh.size("weights") % d == 0]
        raise ValueError(
            f"parallel.expert {degree} does not divide the {model.num_experts} experts of a layer of {family}; "
            f"use parallel.expert {nearest(degree, fits)}"
        )


def shard_experts(weight: Tensor, mesh: Mesh) -> DTensor:
    """A layer's stacked weights [E, ...], whole or cut by tensor parallelism, cut by their experts too."""
    axes, placements, part = mesh["expert"], [], weight
    if isinstance(weight, DTensor):
        axes, placements, part = mesh[("expert", "tensor")], [*weight.placements], weight.to_local()
    own = part.chunk(mesh.size("expert"))[mesh.index("expert")]
    return DTensor.from_local(
        own, axes, [Shard(0), *placements], run_check=False, shape=weight.shape, stride=weight.stride()
    )


@torch.compiler.disable  # it would compile anew for every number of rows that travel
def dispatch(run: Callable[[Tensor, Tensor], Tensor], group: dist.ProcessGroup, x: Tensor, counts: Tensor) -> Tensor:
    """The forward of Experts where they lie on several processes; `run` is that of those here.

    x       [M, W], this process's rows sorted by expert
    counts  int64 [E], rows of each; rows behind the last expert's (padding) do not travel
    -> [M, W]

    Rows come back to where they were, so nothing else in the model knows of the journey. No expert has a capacity: all
    rows travel, whatever the load. A process that gets none computes with none, since all take part in every exchange.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)  # what the experts would make of it: half as much travels
    degree = group.size()
    coming = torch.empty_like(counts)
    dist.all_to_all_single(coming, counts, group=group)
    by_process = torch.stack([counts, coming]).view(2, degree, -1)  # [2, D, E / D]: what goes where, what comes whence
    # How much travels must be known here before it does. This is the one place where a layer waits for the device.
    sent, received = by_process.sum(dim=2).tolist()
    rows = all_to_all_single_autograd(x[: sum(sent)], received, sent, group)
    there, back = sort_by_expert(by_process[1], len(rows))
    out = run(_Reorder.apply(rows, there, back), by_process[1].sum(dim=0))
    out = all_to_all_single_autograd(_Reorder.apply(out, back, there), sent, received, group)
    return F.pad(out, (0, 0, 0, len(x) - len(out)))


def sort_by_expert(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The order of rows by (expert, process) where they lie by (process, expert), and the way back: int64 [total].

    counts: int64 [D, E / D], the rows that each process has sent for each expert here; they sum to `total`.
    """
    processes, experts = counts.shape
    expert = torch.arange(experts, device=counts.device).repeat(processes)
    there = expert.repeat_interleave(counts.flatten(), output_size=total).argsort(stable=True)
    index = torch.arange(total, device=counts.device)
    return there, torch.empty_like(there).scatter_(0, there, index)


class _Reorder(torch.autograd.Function):
    """x[there], whose backward is grad[back]: autograd's own adds row by row into zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, there)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None
