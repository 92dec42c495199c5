"""Reference implementation: attention with the full score matrix. All other backends are tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from sightline.attention.backend import KernelRequirements
from sightline.masks import AttentionMask


class Reference:
    name = "reference"
    why = "it supports every mask on every device"

    def supports(self, requirements: KernelRequirements) -> str | None:
        return None

    def lower(self, mask: AttentionMask, requirements: KernelRequirements) -> Tensor:
        """Return the dense mask bool [B, 1, Q, T]."""
        return mask.to(requirements.device).to_dense().unsqueeze(1)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Tensor, scale: float, sinks: Tensor | None, softcap: float | None
    ) -> Tensor:
        """Compute in float32 or wider; a sink is one more logit without a value."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        group = q.shape[1] // k.shape[1]
        keys, values = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
        scores = (q.to(dtype) @ keys.mT) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~inputs, float("-inf"))
        if sinks is not None:
            column = sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], dim=3)
        has_keys = inputs.any(dim=3, keepdim=True)
        # A fully masked query has only -inf, whose softmax is NaN: use zeros as its scores and set its weights to zero.
        weights = scores.masked_fill(~has_keys, 0.0).softmax(dim=3).masked_fill(~has_keys, 0.0)
        return (weights[..., : k.shape[2]] @ values).to(q.dtype)
