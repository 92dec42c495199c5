"""Autocast, for code that computes around it."""

from __future__ import annotations

import torch
from torch import Tensor


def autocast_kind(x: Tensor) -> str:
    """The type of device whose autocast `x` computes under; meta tensors have none of their own and take the CPU's."""
    return x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes matrix products of `x` in, or None where it is off."""
    kind = autocast_kind(x)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def no_autocast(x: Tensor) -> torch.autocast:
    """A context in which `x` computes in its own precision."""
    return torch.autocast(autocast_kind(x), enabled=False)
