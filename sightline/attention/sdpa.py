"""PyTorch's fused attention as one call under a dense mask: any device. On a CPU the tiled backend serves instead."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sightline.attention.backend import KernelRequirements
from sightline.masks import AttentionMask

# The order in which CUDA's kernels are tried, fastest first.
PRIORITY = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Dense(NamedTuple):
    """Plain causal attention over whole rows, or bool [B, 1, Q, T] and the queries that see nothing."""

    visible: Tensor | None
    fully_masked: Tensor | None


class Sdpa:
    name = "sdpa"
    why = "it takes every mask on every device"

    def supports(self, needs: KernelRequirements) -> str | None:
        return None

    def lower(self, mask: AttentionMask, needs: KernelRequirements) -> Dense:
        _, queries, keys = mask.shape
        if mask.intervals == 1 and queries == keys:
            index = torch.arange(1, queries + 1, dtype=torch.int32)
            if bool((mask.start == 0).all()) and bool((mask.stop[..., 0] == index).all()):
                return Dense(None, None)
        any_unseeing = not bool(mask.visible_queries().all())
        visible = mask.to(needs.device).to_dense().unsqueeze(1)
        fully_masked = ~visible.any(dim=3, keepdim=True)
        # A query that sees nothing would turn to NaN: it sees the first key, and its output is taken away again.
        visible[..., :1] |= fully_masked
        return Dense(visible, fully_masked if any_unseeing else None)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Dense, scale: float, sinks: Tensor | None) -> Tensor:
        bias = inputs.visible
        if sinks is not None:
            k, v, bias = _with_sink_key(q, k, v, inputs, sinks)
        with sdpa_kernel(PRIORITY, set_priority=True):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, is_causal=bias is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        return out if inputs.fully_masked is None else out.masked_fill(inputs.fully_masked, 0.0)


def _with_sink_key(q: Tensor, k: Tensor, v: Tensor, inputs: Dense, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One more key of zeros, whose score is the sink, with a value of zeros: keys, values and the scores' bias."""
    rows, heads, queries, _ = q.shape
    hidden = torch.zeros(rows, 1, queries, k.shape[2], dtype=q.dtype, device=q.device)
    visible = inputs.visible
    if visible is None:
        visible = torch.ones(queries, k.shape[2], dtype=torch.bool, device=q.device).tril()
    hidden = hidden.masked_fill(~visible, float("-inf")).expand(-1, heads, -1, -1)
    column = sinks.to(q.dtype).view(1, heads, 1, 1).expand(rows, -1, queries, 1)
    return F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), torch.cat([hidden, column], dim=3)
