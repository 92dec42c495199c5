"""The norm of a gradient whose parts lie on many processes."""

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
    """Scale the gradients down to a norm of `max_norm` over all parameters of all processes; returns the norm before.

    torch.nn.utils.clip_grad_norm_ does this for tensors of one mesh. Here experts, layers and pipeline stages lie on
    different ones, so each process squares what it holds, and the squares are added over the axes that cut it.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    cut: dict[tuple, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        cut[_cuts(gradient)].append(local_part(gradient))
    total = torch.zeros((), device=mesh.device)
    for (device_mesh, dims), parts in cut.items():
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


def _cuts(gradient: Tensor) -> tuple:
    """The mesh a gradient lies on and the dims of it that cut it."""
    if not isinstance(gradient, DTensor):
        return None, ()
    assert not any(p.is_partial() for p in gradient.placements), gradient.placements
    return gradient.device_mesh, tuple(dim for dim, p in enumerate(gradient.placements) if not p.is_replicate())
