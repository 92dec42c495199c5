"""FlexAttention: one compiled kernel for all masks. It trains on CUDA; on a CPU it has a forward only."""

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
    why = "it supports every mask on CUDA"

    def supports(self, requirements: KernelRequirements) -> str | None:
        if requirements.device.type != "cpu":
            return None
        if requirements.training:
            return "flex does not train on a CPU, where FlexAttention has no backward"
        return "flex does not support sinks on a CPU, where it returns no log-sum-exp" if requirements.sinks else None

    def lower(self, mask: AttentionMask, requirements: KernelRequirements) -> BlockMask:
        """Build the BlockMask on the device, without synchronization."""
        return mask.to(requirements.device).to_block_mask(compute_q_blocks=requirements.training)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        inputs: BlockMask,
        scale: float,
        sinks: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        score_mod = None if softcap is None else _softcap_mod(softcap)
        kernel = functools.partial(
            _compiled(), q, k, v, score_mod, inputs, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        if sinks is None:
            return kernel()
        aux_request: Any = AuxRequest(lse=True)
        out, aux = kernel(return_aux=aux_request)
        # exp(lse - logaddexp(lse, sink)) is a sigmoid; for a fully masked query, lse is -inf and this is 0.
        share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype).view(1, -1, 1))
        return out * share.unsqueeze(3).to(out.dtype)


@functools.cache
def _softcap_mod(softcap: float) -> Callable[..., Tensor]:
    """Return the score_mod of a soft cap; each value of it compiles once."""

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@functools.cache
def _compiled() -> Callable[..., Any]:
    """Compile FlexAttention at its first use, since loading the compiler takes seconds.

    All masks share one mask_mod, which reads the intervals as data, so only a new shape recompiles, not a new layout.
    Dynamic shapes fail on a CPU and are slower on a GPU.
    """
    return torch.compile(flex_attention, dynamic=False)
