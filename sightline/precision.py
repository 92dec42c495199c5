"""Helpers for code that handles autocast itself."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_device_type(x: Tensor) -> str:
    """Return the device type whose autocast settings apply to `x`. Meta tensors use those of the CPU."""
    return x.device.type if torch.amp.is_autocast_available(x.device.type) else "cpu"


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast computes matrix products of `x`, or None if autocast is off."""
    device_type = autocast_device_type(x)
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context manager that disables autocast for the device of `x`; a trivial one if autocast is off."""
    device_type = autocast_device_type(x)
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()
