"""Muon (Keller Jordan, 2024, https://kellerjordan.github.io/posts/muon): orthogonalized momentum."""

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
"""Coefficients of x, x^3 and x^5 in an iteration, chosen for fast convergence to values near 1 (Jordan's post)."""
ITERATIONS = 5
EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon for the matrices of the layers; AdamW for embedding, output projection, norms and biases.

    A step equals that of `torch.optim.Muon` with `nesterov` and `match_rms_adamw`: the update is the orthogonalized
    momentum times 0.2 sqrt(max(out, in)), which has the root mean square of AdamW's updates, so that both use the same
    learning rate and weight decay (arXiv 2502.16982, section 2.2). Stacked experts [E, out, in] are E matrices.
    Orthogonalization runs in bfloat16 on a GPU, as in torch, and in float32 on a CPU.

    On a device mesh the momentum is sharded like its parameter. Each rank all-gathers the momentum of matrices that
    FSDP or tensor parallelism shard, computes the full update and applies its shard of it; experts on different ranks
    are not gathered. Updates equal those of one process up to rounding: in float32, losses and gradient norms of ten
    steps agree within 1e-5, as with AdamW. In bfloat16 the iteration has a rounding error of about 1e-2 everywhere.
    """

    def __init__(self, parameters: list[ParameterInfo], options: config.OptimizerConfig) -> None:
        matrices = [p for _, p, role in parameters if role is Role.MATRIX]
        self.found_inf: Tensor | None = None
        self.adamw = AdamW([info for info in parameters if info.role is not Role.MATRIX], options)
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
        applied = grad.new_ones(())  # 0 to skip the step
        if self.found_inf is not None:
            applied = 1 - self.found_inf.to(grad)
            grad = torch.where(applied.bool(), grad, 0)  # 0 * inf would be nan
        momentum.lerp_(grad, (1 - group["momentum"]) * applied)
        update = _orthogonalize_part(grad.lerp(momentum, group["momentum"]), p)
        weight.mul_(1 - group["lr"] * group["weight_decay"] * applied)
        weight.sub_(update * (group["lr"] * 0.2 * max(p.shape[-2:]) ** 0.5 * applied))


def orthogonalize(x: Tensor) -> Tensor:
    """Return matrices [..., out, in] with the singular vectors of x and singular values near 1, in the dtype of x.

    Uses the Newton-Schulz iteration x <- a x + (b x x' + c (x x')^2) x, transposed if that makes x x' smaller.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).reshape(-1, min(x.shape[-2:]), max(x.shape[-2:]))
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)  # now the largest singular value is at most 1
    for _ in range(ITERATIONS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).reshape(x.shape)


def _orthogonalize_part(part: Tensor, p: nn.Parameter) -> Tensor:
    """Apply `orthogonalize` to a tensor with the shape and placements of p; `part` and the result are local shards."""
    x = part.bfloat16() if part.is_cuda else part
    if not isinstance(p, DTensor):
        return orthogonalize(x).to(part.dtype)
    # The ranks that share a matrix hold the same experts, so the expert dim counts as replicated.
    placements = [placement if _shards_matrix(placement, p) else Replicate() for placement in p.placements]
    shape = torch.Size((*part.shape[:-2], *p.shape[-2:]))
    sharded = DTensor.from_local(x, p.device_mesh, placements, run_check=False, shape=shape, stride=p.stride())
    full = sharded
    # FSDP first, in reverse order of sharding: torch warns if all axes change at once.
    for axis in range(1, len(placements) + 1):
        full = full.redistribute(placements=[Replicate()] * axis + placements[axis:])
    return local_shard(orthogonalize(full.to_local()), sharded).to(part.dtype)


def _shards_matrix(placement: Placement, p: nn.Parameter) -> bool:
    """Return whether a placement shards the rows or columns of the matrices [..., out, in] of p."""
    return not placement.is_replicate() and placement.dim >= p.ndim - 2  # type: ignore[attr-defined]
