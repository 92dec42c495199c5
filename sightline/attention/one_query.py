"""Attention of one query per row, as in generation with a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sightline.attention.attend import Lowered, lower
from sightline.attention.backend import KernelRequirements, Unsupported
from sightline.attention.exchange import Exchange, LocalExchange
from sightline.attention.torch_private import flash_forward
from sightline.masks import AttentionMask
from sightline.masks.segments import number_segments


def lower_queries(
    mask: AttentionMask, *, backend: str, exchange: Exchange, segments: bool, **requirements: Any
) -> Lowered:
    """Return `lower` of a mask; with the backend `auto` and one query per row, a mask for `OneQuery` if it applies.

    Arguments and errors are those of `lower`.
    """
    kernel, needs = OneQuery(), KernelRequirements(**requirements)
    if backend == "auto" and isinstance(exchange, LocalExchange) and kernel.supports(needs) is None:
        inputs = kernel.lower(mask, needs)
        if not isinstance(inputs, Unsupported):
            numbers = number_segments(mask) if segments else None
            # No query is fully masked.
            return Lowered(mask, kernel, kernel.why, needs, inputs, exchange, None, numbers)
    return lower(mask, backend=backend, exchange=exchange, segments=segments, **requirements)


class OneQuery:
    """Attention of one query per row on a CPU, where the overhead of a kernel for tiles is greater than its gain.

    It is no choice of `attention.backend`, since it has no backward.
    """

    name = "one query"
    why = "each row has one query, and no gradients are needed"

    def supports(self, requirements: KernelRequirements) -> str | None:
        if requirements.training:
            return "one query has no backward"
        device = requirements.device.type
        return None if device == "cpu" else f"one query runs on a CPU only, got device {device}"

    def lower(self, mask: AttentionMask, requirements: KernelRequirements) -> Tensor | Unsupported | None:
        """Return the bias of the scores, [B, 1, 1, T]: 0 or -inf. None if every query attends to all keys."""
        if mask.shape[1] != 1:
            return Unsupported(f"rows have {mask.shape[1]} queries")
        if mask.intervals == 1 and bool(((mask.start == 0) & (mask.stop == mask.key_length)).all()):
            return None
        hidden = ~mask.to_dense()[:, None]
        if bool(hidden.all(dim=-1).any()):
            return Unsupported("a query attends to no key")  # its softmax would be NaN
        return torch.zeros(hidden.shape, dtype=requirements.dtype).masked_fill_(hidden, -torch.inf)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inputs: Tensor | None,
        scale: float,
        sinks: Tensor | None,
        softcap: float | None = None,
    ) -> Tensor:
        """q [B, H, 1, D], k [B, G, T, D], v [B, G, T, E] -> [B, H, 1, E]."""
        # The H / G query heads of a group are the rows of one matrix, so the keys of a group are read once.
        grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        sink = None if sinks is None else sinks.view(1, k.shape[1], -1)
        if softcap is None and v.shape[3] == q.shape[3]:
            bias = None if inputs is None else inputs.expand(-1, -1, grouped.shape[2], -1)
            out, lse = flash_forward(grouped, k, v, 0.0, False, attn_mask=bias, scale=scale)
            if sink is not None:  # it has no value: the other weights become smaller
                out = (out * (lse - sink).sigmoid()[..., None]).to(q.dtype)
            return out.view_as(q)
        dtype = torch.promote_types(q.dtype, torch.float32)
        scores = torch.matmul(grouped.to(dtype) * scale, k.to(dtype).mT)
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        if inputs is not None:
            scores += inputs
        if sink is None:
            weights = scores.softmax(dim=-1)
        else:
            column = sink.to(dtype).expand(len(q), -1, -1)[..., None]
            weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
        return torch.matmul(weights, v.to(dtype)).to(q.dtype).view(*q.shape[:3], -1)
