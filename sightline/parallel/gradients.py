"""Gradient clipping by the norm over parameters that are sharded across different meshes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sightline.parallel.mesh import Mesh
from sightline.parallel.redistribute import local_part
from sightline.parallel.torch_private import foreach_multiply_, foreach_norm


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, mesh: Mesh) -> Tensor:
    """Clip the gradients to a total norm of `max_norm` over the parameters of all ranks; return the norm before.

    torch.nn.utils.clip_grad_norm_ requires all tensors on one mesh. Here experts, layers and pipeline stages are on
    different meshes, so each rank sums the squares of its local shards, and an all-reduce over the axes that shard a
    gradient adds them up.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    shards: dict[tuple, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        shards[_sharded_dims(gradient)].append(local_part(gradient))
    total = torch.zeros((), device=mesh.device)
    for (device_mesh, dims), parts in shards.items():
        norms = foreach_norm([part.float() for part in parts if part.numel()])
        square = torch.stack([torch.zeros((), device=mesh.device), *(norm.to(mesh.device) for norm in norms)]).square()
        summed = square.sum()
        for dim in dims:
            torch.distributed.all_reduce(summed, group=device_mesh.get_group(dim))
        total += summed
    norm = mesh.all_reduce(total, "pipeline").sqrt()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    if gradients:
        foreach_multiply_([local_part(gradient) for gradient in gradients], scale)
    return norm


def _sharded_dims(gradient: Tensor) -> tuple:
    """Return the mesh of a gradient and the mesh dims that shard it; (None, ()) for a plain tensor."""
    if not isinstance(gradient, DTensor):
        return None, ()
    assert not any(p.is_partial() for p in gradient.placements), gradient.placements
    return gradient.device_mesh, tuple(dim for dim, p in enumerate(gradient.placements) if not p.is_replicate())
