"""What an attention kernel states of itself: a backend is one object."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sightline.masks import AttentionMask


@dataclass(frozen=True, kw_only=True)
class KernelRequirements:
    """What attention layers ask of a kernel, whatever the mask.

    device, dtype  of the queries
    training       whether gradients will be asked for
    sinks          whether heads have learned sink logits
    head_dim       D, channels of a head; None where it is not known yet
    """

    device: torch.device
    dtype: torch.dtype
    training: bool = False
    sinks: bool = False
    head_dim: int | None = None


class Unsupported(NamedTuple):
    """Returned by `Backend.lower` for a mask that the kernel cannot honor."""

    reason: str


class Backend(Protocol):
    """An attention kernel and what it makes of a mask.

    name  the value of the option, in errors and in the log
    why   why `auto` takes it, for the log
    """

    name: str
    why: str

    def supports(self, needs: KernelRequirements) -> str | None:
        """Why the kernel cannot serve such layers, whatever the mask; None where it can.

        The reason is a clause that begins with the backend's name: "varlen runs on CUDA only, and this is cpu".
        """
        ...

    def lower(self, mask: AttentionMask, needs: KernelRequirements) -> Any:
        """The kernel's inputs for a mask on the CPU, copied to `needs.device` without a wait for it, or Unsupported."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Any, scale: float, sinks: Tensor | None) -> Tensor:
        """[B, H, Q, D]: see `sightline.attention.attend`. `inputs` come from `lower`."""
        ...
