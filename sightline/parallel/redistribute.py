"""How a tensor lies on processes, and how it passes from one way to another, forward and backward."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement


def local_part(x: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def redistribute(
    x: Tensor, mesh: DeviceMesh, before: Placement, after: Placement, gradient: Placement | None = None
) -> Tensor:
    """This process's part of a tensor that lies on `mesh` as `before`, when it lies there as `after`.

    x         Shard: a part of it, all of one size; Replicate: all of it; Partial: one summand of it
    gradient  how the gradient of the result lies there; as the result itself, if nothing is said. Partial is for what
              every process has and uses in a way of its own, and the backward adds that up
    """
    spread = DTensor.from_local(x, mesh, [before], run_check=False)
    if before != after:
        spread = spread.redistribute(placements=[after])
    return spread.to_local(grad_placements=None if gradient is None else [gradient])
