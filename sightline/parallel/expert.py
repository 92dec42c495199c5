"""Expert parallelism: each rank has some of a layer's experts, and tokens are sent to their experts by all-to-all."""

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
from sightline.models.decoder import Decoder
from sightline.numbers import divisors, nearest
from sightline.parallel.mesh import Degrees, Mesh
from sightline.parallel.patch import expose_local_parameters, identity_view, replace_forward, replace_parameter
from sightline.parallel.torch_private import all_to_all_single_autograd
from sightline.precision import autocast_dtype


def apply_expert(model: Decoder, mesh: Mesh) -> None:
    """Shard the experts of every layer across the axis `expert`, in order, after tensor parallelism.

    The stacked weights [E, ...] become DTensors: this rank stores E / degree experts, and of each expert its tensor
    parallel shard. Their gradients are sums over the tokens of all ranks of `expert`.

    `check_expert` has checked the degree.
    """
    if mesh.size("expert") == 1:
        return
    group = mesh.group("expert")
    for experts in model.modules():
        if isinstance(experts, Experts):
            weights = dict(experts.named_parameters(recurse=False))
            for name, weight in weights.items():
                replace_parameter(experts, name, shard_experts(weight, mesh))
            if mesh.size("tensor") == 1:  # else tensor parallelism has set the views
                expose_local_parameters(experts, **dict.fromkeys(weights, identity_view))
            replace_forward(experts, lambda run: functools.partial(dispatch, run, group))


def check_expert(model: Decoder, degrees: Degrees) -> None:
    """Check that the degree of `expert` divides the number of experts.

    Raises:
        ValueError: if it does not, or if the model has no experts.
    """
    degree, family = degrees.size("expert"), type(model).__name__
    if degree == 1:
        return
    if not model.num_experts:
        raise ValueError(f"parallel.expert {degree}: {family} has no experts with these sizes; use parallel.expert 1")
    if model.num_experts % degree:
        valid = [d for d in divisors(model.num_experts) if degrees.size("weights") % d == 0]
        raise ValueError(
            f"parallel.expert {degree} does not divide the {model.num_experts} experts of a layer of {family}; "
            f"use parallel.expert {nearest(degree, valid)}"
        )


def shard_experts(weight: Tensor, mesh: Mesh) -> DTensor:
    """Return a layer's stacked weights [E, ...], full or sharded by tensor parallelism, sharded by expert as well."""
    axes, placements, part = mesh["expert"], [], weight
    if isinstance(weight, DTensor):
        axes, placements, part = mesh[("expert", "tensor")], [*weight.placements], weight.to_local()
    local = part.chunk(mesh.size("expert"))[mesh.index("expert")]
    return DTensor.from_local(
        local, axes, [Shard(0), *placements], run_check=False, shape=weight.shape, stride=weight.stride()
    )


@torch.compiler.disable  # otherwise every new number of exchanged tokens would recompile
def dispatch(run: Callable[[Tensor, Tensor], Tensor], group: dist.ProcessGroup, x: Tensor, counts: Tensor) -> Tensor:
    """Forward of sharded `Experts`: dispatch the tokens to their experts' ranks, run the local experts, combine.

    run     the forward of the local experts
    x       [M, W], this rank's tokens sorted by expert
    counts  int64 [E], tokens of each expert; tokens after those of the last expert (padding) are not sent
    -> [M, W], in the order of x

    Experts have no capacity limit: all tokens are sent, whatever the load. A rank that receives none runs its experts
    on an empty tensor, since every rank must take part in every exchange.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)  # as the experts would do: halves the bytes to send
    degree = group.size()
    received_counts = torch.empty_like(counts)
    dist.all_to_all_single(received_counts, counts, group=group)
    # [2, D, E / D]: tokens sent to and received from each rank, by expert
    by_rank = torch.stack([counts, received_counts]).view(2, degree, -1)
    # The CPU must know the sizes of the all-to-all in advance. Only here does a layer wait for the device.
    sent, received = by_rank.sum(dim=2).tolist()
    tokens = all_to_all_single_autograd(x[: sum(sent)], received, sent, group)
    order, inverse = sort_by_expert(by_rank[1], len(tokens))
    out = run(_Permute.apply(tokens, order, inverse), by_rank[1].sum(dim=0))
    out = all_to_all_single_autograd(_Permute.apply(out, inverse, order), sent, received, group)
    return F.pad(out, (0, 0, 0, len(x) - len(out)))


def sort_by_expert(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return the permutation from (rank, expert) order to (expert, rank) order and its inverse, int64 [total] each.

    counts  int64 [D, E / D], tokens that each rank has sent to each local expert
    total   sum of the counts
    """
    ranks, experts = counts.shape
    expert = torch.arange(experts, device=counts.device).repeat(ranks)
    order = expert.repeat_interleave(counts.flatten(), output_size=total).argsort(stable=True)
    index = torch.arange(total, device=counts.device)
    return order, torch.empty_like(order).scatter_(0, order, index)


class _Permute(torch.autograd.Function):
    """x[order] with backward grad[inverse]. The backward of plain indexing would add row by row into zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
