"""Root-mean-square normalization, on a CPU in one pass over memory by the native kernel.

torch.ops.sightline.rms_norm(x, weight, eps) -> (output, 1 / root-mean-square of each row)
torch.ops.sightline.rms_norm_backward(d_out, x, weight, rstd) -> (gradients of x and weight)
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from sightline.layers.linear import is_plain_float32
from sightline.native import why_missing
from sightline.native.norm import empty_outputs, rms_norm_backward, rms_norm_forward
from sightline.native.operator import define_operator

MIN_SIZE = 32768
"""Elements of x below which PyTorch's function takes less time."""
NORM = define_operator("rms_norm", "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", rms_norm_forward)
NORM_BACKWARD = define_operator(
    "rms_norm_backward",
    "(Tensor d_out, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    rms_norm_backward,
)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (arXiv 1910.07467)."""

    MATRICES: ClassVar = ()

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size))

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class ZeroCenteredRMSNorm(RMSNorm):
    """RMSNorm that scales by 1 + weight, so that weight decay pulls the scale to 1 instead of 0."""

    def init_weights(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1 + self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dim: x [..., W], weight [W] -> [..., W].

    F.rms_norm runs six operators on a CPU, each of which reads and writes whole tensors, and keeps some of them for the
    backward.
    """
    if torch.compiler.is_compiling() or not _native_applies(x, weight):
        return F.rms_norm(x, weight.shape, weight, eps)
    return NORM(x, weight, eps)[0]


def _native_applies(x: Tensor, weight: Tensor) -> bool:
    """Whether both are plain float32 tensors on a CPU, large enough, without autocast and forward-mode derivatives."""
    return (
        is_plain_float32(x, weight, allow_fake=True)
        and x.numel() >= MIN_SIZE
        and unpack_dual(x).tangent is None
        and unpack_dual(weight).tangent is None
        and why_missing() is None
    )


@torch.library.register_fake(NORM)
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return empty_outputs(x)


@torch.library.register_fake(NORM_BACKWARD)
def _(d_out: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return empty_outputs(x)[0], weight.new_empty(weight.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_out: Tensor, _d_rstd: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, rstd = ctx.saved_tensors
    if not torch.is_grad_enabled():
        return *NORM_BACKWARD(d_out, x, weight, rstd), None
    # With create_graph=True the gradients are differentiated in turn: those of PyTorch's function can be.
    out = F.rms_norm(x, weight.shape, weight, ctx.eps)
    wanted = [tensor for tensor in (x, weight) if tensor.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, d_out, create_graph=True))
    return *(next(found) if tensor.requires_grad else None for tensor in (x, weight)), None


torch.library.register_autograd(NORM, _backward, setup_context=_save_for_backward)
