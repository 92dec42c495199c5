"""Variable-length FlashAttention of `torch.nn.attention.varlen`: CUDA, half precision, masks given by cu_seqlens."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.attention.backend import KernelRequirements, Unsupported
from sightline.attention.first_order import first_order
from sightline.attention.torch_private import varlen_backward, varlen_forward
from sightline.masks import AttentionMask
from sightline.masks.varlen import VarlenLayout

if TYPE_CHECKING:
    import torch.nn.attention.varlen

DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256  # limit of FlashAttention 2


class Varlen:
    name = "varlen"
    why = "the mask is documents with at most one window, in half precision on CUDA"

    def supports(self, requirements: KernelRequirements) -> str | None:
        if requirements.device.type != "cuda":
            return f"varlen runs on CUDA only, got device {requirements.device.type}"
        if requirements.dtype not in DTYPES:
            return f"varlen needs bfloat16 or float16, got {requirements.dtype}"
        if requirements.softcap:
            return "varlen does not support softcap"
        for name, size in (("head_dim", requirements.head_dim), ("value_dim", requirements.value_dim)):
            if size is not None and size > MAX_HEAD_DIM:
                return f"varlen supports a {name} of at most {MAX_HEAD_DIM}, got {size}"
        if not requirements.same_tokens:
            return "varlen needs queries and keys to be the same tokens"
        return None

    def lower(self, mask: AttentionMask, requirements: KernelRequirements) -> VarlenLayout | Unsupported:
        """Build the layout on the CPU, without synchronization, and copy it to the device."""
        importlib.import_module("torch.nn.attention.varlen")  # imported here since it takes a second
        try:
            layout = mask.to_varlen()
        except ValueError as error:
            return Unsupported(str(error))
        padding = None if layout.padding is None else layout.padding.to(requirements.device, non_blocking=True)
        return replace(layout, cu_seqlens=layout.cu_seqlens.to(requirements.device, non_blocking=True), padding=padding)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inputs: VarlenLayout,
        scale: float,
        sinks: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        rows, _, length, head_dim = q.shape
        value_dim = v.shape[3]
        # The kernel needs one size for q, k and v, a multiple of 8. Channels of zeros do not change the products.
        size = -(-max(head_dim, value_dim) // 8) * 8
        query, key, value = (_pad(x.transpose(1, 2).flatten(0, 1), size) for x in (q, k, v))  # [B * S, heads, size]
        if sinks is None:
            longest, offsets = inputs.max_length, inputs.cu_seqlens
            gqa = q.shape[1] != k.shape[1]
            out = torch.nn.attention.varlen.varlen_attn(
                query, key, value, offsets, offsets, longest, longest,
                scale=scale, window_size=inputs.window, enable_gqa=gqa,
            )  # fmt: skip
        else:
            out = _SinkAttention.apply(query, key, value, sinks, inputs, scale)
        out = out[..., :value_dim].unflatten(0, (rows, length)).transpose(1, 2)  # type: ignore[call-overload]
        return out if inputs.padding is None else out.masked_fill(inputs.padding[:, None, :, None], 0.0)


def _pad(x: Tensor, size: int) -> Tensor:
    return F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x


class _SinkAttention(torch.autograd.Function):
    """Variable-length attention with learned sinks [H].

    The log-sum-exp of `varlen_attn` has no gradient, so sinks cannot be added to its output. They are added between its
    forward and backward kernels: a sink increases the log-sum-exp and scales the output, and the backward kernel, which
    recomputes the weights from both, returns the exact gradients. The gradient of a sink is -sum(p * delta), with p the
    weight of the sink and delta = sum(dO * O).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, inputs: VarlenLayout, scale: float
    ) -> Tensor:
        offsets, longest = inputs.cu_seqlens, inputs.max_length
        causal = inputs.window == (-1, 0)
        window = list(inputs.window)
        out, lse, rng = varlen_forward(
            query, key, value, offsets, offsets, longest, longest, causal, scale, window, query.shape[1] != key.shape[1]
        )
        with_sink = torch.logaddexp(lse, sinks.to(lse.dtype).unsqueeze(1))  # [H, N]
        out = (out * (lse - with_sink).exp().mT.unsqueeze(2)).to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, out, with_sink, rng)
        ctx.inputs, ctx.scale, ctx.causal, ctx.window = inputs, scale, causal, window
        return out

    @staticmethod
    @first_order("varlen")
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse, rng = ctx.saved_tensors
        offsets, longest = ctx.inputs.cu_seqlens, ctx.inputs.max_length
        d_query, d_key, d_value = varlen_backward(
            d_out, query, key, value, out, lse, offsets, offsets, longest, longest, ctx.causal, rng, ctx.scale,
            ctx.window,
        )  # fmt: skip
        delta = (d_out.to(lse.dtype) * out.to(lse.dtype)).sum(dim=2).mT  # [H, N]
        weight = (sinks.to(lse.dtype).unsqueeze(1) - lse).exp()
        d_sinks = -(weight * delta).sum(dim=1).to(sinks.dtype)
        return d_query, d_key, d_value, d_sinks, None, None
