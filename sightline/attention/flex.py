"""FlexAttention: one compiled kernel for all masks. Trains on CUDA; on a CPU it computes a forward only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from sightline.attention.backend import KernelRequirements
from sightline.masks import AttentionMask


class Flex:
    name = "flex"
    why = "it takes every mask on CUDA"

    def supports(self, needs: KernelRequirements) -> str | None:
        if needs.device.type != "cpu":
            return None
        if needs.training:
            return "flex cannot train on a CPU, where FlexAttention has no backward"
        return "flex cannot honor sinks on a CPU, where it returns no log-sum-exp" if needs.sinks else None

    def lower(self, mask: AttentionMask, needs: KernelRequirements) -> BlockMask:
        """Built on the device, by operations that read nothing back."""
        return mask.to(needs.device).to_block_mask(compute_q_blocks=needs.training)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: BlockMask, scale: float, sinks: Tensor | None) -> Tensor:
        gqa = q.shape[1] != k.shape[1]
        if sinks is None:
            return _compiled()(q, k, v, block_mask=inputs, scale=scale, enable_gqa=gqa)
        wanted: Any = AuxRequest(lse=True)
        out, aux = _compiled()(q, k, v, block_mask=inputs, scale=scale, enable_gqa=gqa, return_aux=wanted)
        # exp(lse - logaddexp(lse, sink)) is a sigmoid; where a query sees nothing, lse is -inf and this is 0.
        share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype).view(1, -1, 1))
        return out * share.unsqueeze(3).to(out.dtype)


@functools.cache
def _compiled() -> Callable[..., Any]:
    """FlexAttention compiled once, when first wanted: loading the compiler takes seconds.

    Layouts are data that the mask's one mask_mod reads, so a new layout never compiles again; another shape does, once.
    Dynamic shapes fail on a CPU, and cost speed on a GPU.
    """
    return torch.compile(flex_attention, dynamic=False)
