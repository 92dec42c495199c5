"""PyTorch's scaled_dot_product_attention with a dense mask, on any device; on a CPU another backend is used."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sightline.attention.backend import KernelRequirements
from sightline.masks import AttentionMask

# Order in which the CUDA kernels are tried, fastest first.
PRIORITY = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Dense(NamedTuple):
    """Dense mask.

    visible       bool [B, 1, Q, T]; None: plain causal attention over full rows
    fully_masked  bool [B, 1, Q, 1], queries that attend to no key; None if there are none
    """

    visible: Tensor | None
    fully_masked: Tensor | None


class Sdpa:
    name = "sdpa"
    why = "it supports every mask on every device"

    def supports(self, requirements: KernelRequirements) -> str | None:
        return "sdpa does not support softcap" if requirements.softcap else None

    def lower(self, mask: AttentionMask, requirements: KernelRequirements) -> Dense:
        _, queries, keys = mask.shape
        if mask.intervals == 1 and queries == keys:
            index = torch.arange(1, queries + 1, dtype=torch.int32)
            if bool((mask.start == 0).all()) and bool((mask.stop[..., 0] == index).all()):
                return Dense(None, None)
        any_fully_masked = not bool(mask.visible_queries().all())
        visible = mask.to(requirements.device).to_dense().unsqueeze(1)
        fully_masked = ~visible.any(dim=3, keepdim=True)
        # A fully masked query would give NaN: it attends to the first key instead, and `attend` zeroes its output.
        visible[..., :1] |= fully_masked
        return Dense(visible, fully_masked if any_fully_masked else None)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Dense, scale: float, sinks: Tensor | None, softcap: float | None
    ) -> Tensor:
        bias = inputs.visible
        if sinks is not None:
            k, v, bias = _with_sink_key(q, k, v, inputs, sinks)
        with sdpa_kernel(PRIORITY, set_priority=True):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, is_causal=bias is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        return out if inputs.fully_masked is None else out.masked_fill(inputs.fully_masked, 0.0)


def _with_sink_key(q: Tensor, k: Tensor, v: Tensor, inputs: Dense, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Append a key and a value of zeros, with the sink as the bias of its score: keys, values, bias of the scores."""
    rows, heads, queries, _ = q.shape
    bias = torch.zeros(rows, 1, queries, k.shape[2], dtype=q.dtype, device=q.device)
    visible = inputs.visible
    if visible is None:
        visible = torch.ones(queries, k.shape[2], dtype=torch.bool, device=q.device).tril()
    bias = bias.masked_fill(~visible, float("-inf")).expand(-1, heads, -1, -1)
    column = sinks.to(q.dtype).view(1, heads, 1, 1).expand(rows, -1, queries, 1)
    return F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), torch.cat([bias, column], dim=3)
