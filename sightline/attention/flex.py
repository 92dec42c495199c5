"""FlexAttention: one compiled kernel for all masks. Trains on CUDA; on a CPU it computes a forward only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from sightline.masks import AttentionMask


@functools.cache
def _compiled() -> Callable[..., Any]:
    """FlexAttention compiled once, when first wanted: loading the compiler takes seconds.

    Layouts are data that the mask's one mask_mod reads, so a new layout never compiles again; another shape does, once.
    Dynamic shapes fail on a CPU, and cost speed on a GPU.
    """
    return torch.compile(flex_attention, dynamic=False)


def refusal(mask: AttentionMask, device: torch.device, dtype: torch.dtype, training: bool) -> str | None:
    if device.type == "cpu" and training:
        return "flex cannot train on a CPU (FlexAttention has no backward there); backends that can: sdpa, reference"
    return None


def lower(mask: AttentionMask, device: torch.device, dtype: torch.dtype, training: bool) -> BlockMask:
    return mask.to(device).to_block_mask(compute_q_blocks=training)


def attend(q: Tensor, k: Tensor, v: Tensor, form: BlockMask, scale: float, sinks: Tensor | None) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    if sinks is None:
        return _compiled()(q, k, v, block_mask=form, scale=scale, enable_gqa=gqa)
    if q.device.type == "cpu":
        raise ValueError(
            "flex gives no log-sum-exp on a CPU, so it cannot honour sinks there; backends that can: sdpa, reference"
        )
    wanted: Any = AuxRequest(lse=True)
    out, aux = _compiled()(q, k, v, block_mask=form, scale=scale, enable_gqa=gqa, return_aux=wanted)
    # exp(lse - logaddexp(lse, sink)) is a sigmoid; where a query sees nothing, lse is -inf and this is 0.
    share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype).view(1, -1, 1))
    return out * share.unsqueeze(3).to(out.dtype)
