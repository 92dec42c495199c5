"""The native CPU backend: one C++ call over the intervals, forward and backward, as PyTorch operators.

    torch.ops.sightline.attention(q, k, v, sinks, mask, scale, softcap) -> (output, log-sum-exp)
    torch.ops.sightline.attention_backward(d_out, q, k, v, sinks, mask, output, lse, scale, softcap)

They are registered even if the library is not built, so that models can be traced on fake tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from sightline.attention.backend import KernelRequirements
from sightline.attention.first_order import check_no_transforms
from sightline.attention.torch_private import mark_dynamic_size
from sightline.masks import AttentionMask
from sightline.native import attention_backward, attention_forward, pack_intervals, why_missing
from sightline.native.kernel import DTYPES, empty_gradients, empty_outputs
from sightline.native.operator import define_operator

REMEDY = "use the backend `reference` (--attention.backend reference)"
ATTENTION = define_operator(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor mask, float scale, float softcap) -> (Tensor, Tensor)",
    attention_forward,
)
ATTENTION_BACKWARD = define_operator(
    "attention_backward",
    "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor mask, Tensor out, Tensor lse, float scale, "
    "float softcap) -> (Tensor, Tensor, Tensor, Tensor)",
    attention_backward,
)


@dataclass(frozen=True)  # not a tuple, for whose contents torch.compile would recompile
class Intervals:
    """A mask and its plan as one tensor, int32 [n]: see `sightline.native.kernel`."""

    packed: Tensor


class Native:
    name = "native"
    why = "it is the fastest backend that trains on a CPU"

    def supports(self, requirements: KernelRequirements) -> str | None:
        device, dtype = requirements.device.type, requirements.dtype
        if device != "cpu":
            return f"native runs on a CPU only, got device {device}"
        if dtype not in DTYPES:
            return f"native computes float32 and bfloat16, got {dtype}"
        missing = why_missing()
        return None if missing is None else f"native is not built: {missing}"

    def lower(self, mask: AttentionMask, requirements: KernelRequirements) -> Intervals:
        if not torch.compiler.is_compiling():
            check_no_transforms(self.name, torch.empty(0))  # inside torch.func.grad, new tensors have no address
        packed = pack_intervals(mask.start, mask.stop, mask.shape[2])
        mark_dynamic_size(packed)  # another layout must not recompile a layer
        return Intervals(packed)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inputs: Intervals,
        scale: float,
        sinks: Tensor | None,
        softcap: float | None = None,
    ) -> Tensor:
        sinks = None if sinks is None else sinks.float()
        if not torch.compiler.is_compiling() and any(unpack_dual(x).tangent is not None for x in (q, k, v)):
            # PyTorch would drop the tangents of an operator without a formula for them.
            raise RuntimeError(f"the native attention backend has no forward-mode derivatives; {REMEDY}")
        return ATTENTION(q, k, v, sinks, inputs.packed, scale, softcap or 0.0)[0]


@torch.library.register_fake(ATTENTION)
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_outputs(q, v)


@torch.library.register_fake(ATTENTION_BACKWARD)
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    return empty_gradients(q, k, v, sinks)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, mask, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, sinks, mask, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_out: Tensor, _d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, sinks, mask, out, lse = ctx.saved_tensors
    d_q, d_k, d_v, d_sinks = ATTENTION_BACKWARD(d_out, q, k, v, sinks, mask, out, lse, ctx.scale, ctx.softcap)
    return d_q, d_k, d_v, None if sinks is None else d_sinks, None, None, None


def _refuse_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError(f"the native attention backend has no second derivatives; {REMEDY}")


torch.library.register_autograd(ATTENTION, _backward, setup_context=_save_for_backward)
torch.library.register_autograd(ATTENTION_BACKWARD, _refuse_second_derivative)
