"""The slow truth: attention written out, S x S scores and all. Every other backend is tested against this one."""

from __future__ import annotations

import torch
from torch import Tensor

from sightline.attention.backend import KernelRequirements
from sightline.masks import AttentionMask


class Reference:
    name = "reference"
    why = "it takes every mask everywhere"

    def supports(self, needs: KernelRequirements) -> str | None:
        return None

    def lower(self, mask: AttentionMask, needs: KernelRequirements) -> Tensor:
        """bool [B, 1, Q, T]."""
        return mask.to(needs.device).to_dense().unsqueeze(1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Tensor, scale: float, sinks: Tensor | None) -> Tensor:
        """Computed in at least float32; a sink is one more logit without a value."""
        wide = torch.promote_types(q.dtype, torch.float32)
        group = q.shape[1] // k.shape[1]
        keys, values = (x.to(wide).repeat_interleave(group, dim=1) for x in (k, v))
        scores = (q.to(wide) @ keys.mT) * scale
        scores = scores.masked_fill(~inputs, float("-inf"))
        if sinks is not None:
            column = sinks.to(wide).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], dim=3)
        seen = inputs.any(dim=3, keepdim=True)
        # A query without keys has only -inf, whose softmax is NaN: it takes zeros, and its weights are dropped.
        weights = scores.masked_fill(~seen, 0.0).softmax(dim=3).masked_fill(~seen, 0.0)
        return (weights[..., : k.shape[2]] @ values).to(q.dtype)
