"""The interface of attention backends: one object per kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sightline.masks import AttentionMask


@dataclass(frozen=True, kw_only=True)
class KernelRequirements:
    """Requirements of attention layers on a kernel, independent of the mask.

    device, dtype  device and dtype of the queries
    training       whether the backward pass will run
    sinks          whether heads have learned sink logits
    head_dim       D, channels of a query or key head; None if not known yet
    value_dim      Dv, channels of a value head; None if it equals head_dim
    softcap        whether scores are capped by tanh
    same_tokens    whether queries and keys are always the same tokens; they are not under context parallelism, nor in
                   generation with a cache
    """

    device: torch.device
    dtype: torch.dtype
    training: bool = False
    sinks: bool = False
    head_dim: int | None = None
    value_dim: int | None = None
    softcap: bool = False
    same_tokens: bool = True


class Unsupported(NamedTuple):
    """Returned by `Backend.lower` if the kernel does not support the mask."""

    reason: str


class Backend(Protocol):
    """An attention kernel, and the conversion of masks to its inputs.

    name  value of the option `attention.backend`; also used in errors and in the log
    why   why `auto` chooses this backend, for the log
    """

    name: str
    why: str

    def supports(self, requirements: KernelRequirements) -> str | None:
        """Return why the kernel does not support the requirements, or None if it does.

        The reason is a clause that starts with the backend's name: "varlen runs on CUDA only, got device cpu".
        """
        ...

    def lower(self, mask: AttentionMask, requirements: KernelRequirements) -> Any:
        """Build the kernel inputs for a mask on the CPU, and copy them to `requirements.device` asynchronously.

        Returns Unsupported if the kernel does not support the mask.
        """
        ...

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Any, scale: float, sinks: Tensor | None, softcap: float | None
    ) -> Tensor:
        """Compute `sightline.attention.attend` with the kernel inputs from `lower`: [B, H, Q, Dv].

        The arguments are checked: same dtype and device, the last dimension is contiguous, scale > 0, and softcap is
        None or > 0. A backend whose `supports` refuses `softcap` is never called with one.
        """
        ...
