"""Muon (Keller Jordan, 2024, https://kellerjordan.github.io/posts/muon): momentum, orthogonalized matrix by matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate

from sightline import config
from sightline.layers.base import ParameterInfo, Role
from sightline.models.weight_init import local_shard
from sightline.parallel.redistribute import local_part
from sightline.training.optimizer.adamw import AdamW

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of x, x^3 and x^5 in an iteration: the steepest rise at 0 that still ends near 1 (Jordan's post)."""
ITERATIONS = 5
EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of the layers; AdamW for embedding, output projection, norms and biases.

    A step is that of `torch.optim.Muon` with `nesterov` and `match_rms_adamw`: the orthogonalized momentum times
    0.2 sqrt(max(out, in)), whose root mean square is that of AdamW's updates, so that one learning rate and one weight
    decay serve both (arXiv 2502.16982, section 2.2). Of stacked experts [E, out, in] each is a matrix by itself.
    Orthogonalization computes in bfloat16 on a GPU, as torch's does everywhere, and in float32 on a CPU.

    On a mesh the momentum lies as the parameter does. What FSDP and tensor parallelism have cut out of a matrix is
    gathered for its update, every process computes that update whole and keeps its own part; experts that are cut from
    each other stay where they are. So an update is that of one process up to rounding: in float32, the losses and
    gradient norms of ten steps agree with those of one process within 1e-5, as under AdamW. In bfloat16 the iteration
    itself rounds to about 1e-2, on one process too.

    Raises:
        ValueError: the parameters lie in the CPU's memory and their mesh is of GPUs.
    """

    def __init__(self, parameters: list[ParameterInfo], options: config.OptimizerConfig) -> None:
        check_offload(parameters)
        matrices = [p for _, p, role in parameters if role is Role.MATRIX]
        self.found_inf: Tensor | None = None
        self.adamw = AdamW([facts for facts in parameters if facts.role is not Role.MATRIX], options)
        group = {"params": matrices, "weight_decay": options.weight_decay, "momentum": options.momentum}
        super().__init__([group, *self.adamw.param_groups], {"lr": options.learning_rate})
        self.state = self.adamw.state
        for p in matrices:
            self.state[p] = {"momentum_buffer": torch.zeros_like(p, memory_format=torch.preserve_format)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.adamw.found_inf = self.found_inf
        self.adamw.step()
        group = self.param_groups[0]
        for p in group["params"]:
            if p.grad is not None:
                self._update(p, group)

    def _update(self, p: nn.Parameter, group: dict[str, Any]) -> None:
        assert p.grad is not None
        weight, grad, momentum = (local_part(t) for t in (p, p.grad, self.state[p]["momentum_buffer"]))
        taken = grad.new_ones(())  # 0 for a step that changes nothing
        if self.found_inf is not None:
            taken = 1 - self.found_inf.to(grad)
            grad = torch.where(taken.bool(), grad, 0)  # since 0 times infinity is not 0
        momentum.lerp_(grad, (1 - group["momentum"]) * taken)
        update = _orthogonalize_part(grad.lerp(momentum, group["momentum"]), p)
        weight.mul_(1 - group["lr"] * group["weight_decay"] * taken)
        weight.sub_(update * (group["lr"] * 0.2 * max(p.shape[-2:]) ** 0.5 * taken))


def orthogonalize(x: Tensor) -> Tensor:
    """Matrices [..., out, in] with the singular vectors of x and singular values near 1, in the dtype of x.

    By the Newton-Schulz iteration x <- a x + (b x x' + c (x x')^2) x, on the side where x x' is small.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).reshape(-1, min(x.shape[-2:]), max(x.shape[-2:]))
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)  # the greatest singular value is now at most 1
    for _ in range(ITERATIONS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).reshape(x.shape)


def _orthogonalize_part(part: Tensor, p: nn.Parameter) -> Tensor:
    """`orthogonalize` where `part` is this process's part of what has the shape and the placement of p: its part of the
    result."""
    x = part.bfloat16() if part.is_cuda else part
    if not isinstance(p, DTensor):
        return orthogonalize(x).to(part.dtype)
    # To those that share a matrix, the experts here are all there are.
    placements = [placement if _cuts_matrix(placement, p) else Replicate() for placement in p.placements]
    shape = torch.Size((*part.shape[:-2], *p.shape[-2:]))
    spread = DTensor.from_local(x, p.device_mesh, placements, run_check=False, shape=shape, stride=p.stride())
    whole = spread
    for axis in range(1, len(placements) + 1):  # FSDP's cut first, which came last; at once, torch warns
        whole = whole.redistribute(placements=[Replicate()] * axis + placements[axis:])
    return local_shard(orthogonalize(whole.to_local()), spread).to(part.dtype)


def _cuts_matrix(placement: Placement, p: nn.Parameter) -> bool:
    """Whether an axis of the mesh cuts rows or columns of the matrices [..., out, in] of p."""
    return not placement.is_replicate() and placement.dim >= p.ndim - 2  # type: ignore[attr-defined]


def check_offload(parameters: list[ParameterInfo]) -> None:
    """Refuse parameters in the CPU's memory whose mesh is of GPUs: Muon's matrix products belong on these."""
    for name, p, role in parameters:
        if role is Role.MATRIX and isinstance(p, DTensor) and p.device.type != p.device_mesh.device_type:
            raise ValueError(
                f"optimizer.name muon multiplies matrices on the {p.device_mesh.device_type} devices of the mesh, but "
                f"{name} lies in the memory of {p.device.type}; use --parallel.no-offload, or --optimizer.name adamw"
            )
