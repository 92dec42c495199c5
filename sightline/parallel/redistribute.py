"""Differentiable conversion of local tensors between placements on a device mesh."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement


def local_part(x: Tensor) -> Tensor:
    """Return the local shard of a DTensor; return any other tensor unchanged."""
    return x.to_local() if isinstance(x, DTensor) else x


def redistribute(
    x: Tensor, mesh: DeviceMesh, before: Placement, after: Placement, gradient: Placement | None = None
) -> Tensor:
    """Convert this rank's local tensor from placement `before` to placement `after`.

    x         local tensor. Shard: equal shards; Replicate: the full tensor; Partial: one summand
    gradient  placement of the result's gradient, `after` by default. Use Partial for a replicated result that each rank
              uses differently: the backward sums the gradients over ranks
    """
    tensor = DTensor.from_local(x, mesh, [before], run_check=False)
    if before != after:
        tensor = tensor.redistribute(placements=[after])
    return tensor.to_local(grad_placements=None if gradient is None else [gradient])
