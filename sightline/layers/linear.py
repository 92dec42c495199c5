"""Linear layers that use the fastest of the native kernel and PyTorch's two CPU libraries."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.native import MIN_CHANNELS, few_tokens_linear, why_missing
from sightline.torch_private import HAS_ONEDNN_LINEAR, in_transform, is_fake, is_intercepted, onednn_linear

ONEDNN_SIZE = 2**17
"""Products of the number of tokens and the elements of the weight from which oneDNN's overhead of 8 us is small."""

FEW_TOKENS = 16
"""Most tokens for which the native kernel is the fastest."""
NATIVE_SIZE = 2**15
"""Elements of the weight from which the overhead of the native kernel of 3 us is small."""


class Linear(nn.Linear):
    """nn.Linear whose forward is `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight' + bias as F.linear does; faster in float32 on a CPU, forward and backward.

    F.linear calls MKL, which uses AVX-512 on Intel's processors only. On an AMD EPYC, the native kernel takes half of
    its time for one token and 0.4 to 0.8 for 2 to 16; oneDNN takes half of its time for 64 tokens and more.
    """
    if torch.compiler.is_compiling() or not is_plain_float32(x, weight) or in_transform(x, weight):
        return F.linear(x, weight, bias)
    rows = x.numel() // max(1, x.shape[-1])
    with_onednn = HAS_ONEDNN_LINEAR and rows * weight.numel() >= ONEDNN_SIZE
    if torch.is_grad_enabled():
        return _OneDnnLinear.apply(x, weight, bias) if with_onednn else F.linear(x, weight, bias)
    if 1 <= rows <= FEW_TOKENS and weight.numel() >= NATIVE_SIZE and has_native(x, weight):
        return few_tokens_linear(x.reshape(rows, -1), weight, bias).view(*x.shape[:-1], -1)
    return onednn_linear(x, weight, bias) if with_onednn else F.linear(x, weight, bias)


def has_native(x: Tensor, weight: Tensor) -> bool:
    """Whether the native kernel is built and can compute a product of plain float32 tensors."""
    fits = weight.shape[-1] >= MIN_CHANNELS and weight.stride(-1) == 1
    return fits and why_missing() is None and not is_intercepted(x, weight)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Return grad' x [N, K], the gradient of the weight of `linear`, for grad [M, N] and x [M, K]."""
    # oneDNN is faster with the larger size as that of the weight, also with a copy of the result.
    return linear(x.t(), grad.t()).t().contiguous() if grad.shape[1] > x.shape[1] else linear(grad.t(), x.t())


class _OneDnnLinear(torch.autograd.Function):
    """`onednn_linear` with gradients, which have gradients themselves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        grad_x = linear(grad, weight.t()) if need_x else None
        grad_weight = weight_gradient(rows, x.reshape(-1, x.shape[-1])) if need_weight else None
        return grad_x, grad_weight, rows.sum(dim=0) if ctx.has_bias and need_bias else None


def is_plain_float32(x: Tensor, weight: Tensor, *, allow_fake: bool = False) -> bool:
    """Whether both are plain float32 tensors on a CPU, without autocast; FSDP and tracing use subclasses of Tensor.

    allow_fake  whether fake tensors count as plain, so that estimates of activation memory trace the operator
    """
    return not torch.is_autocast_enabled("cpu") and all(
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and (type(tensor) in (Tensor, nn.Parameter) or (allow_fake and is_fake(tensor)))
        for tensor in (x, weight)
    )
