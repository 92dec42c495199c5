"""Functions that avoid importing slow parts of PyTorch before their first use. Tested with torch 2.11 to 2.13."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

disable_compiler = torch._disable_dynamo
"""`torch.compiler.disable`, which imports torch._dynamo only when the decorated function is first called."""


def is_dtensor(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor: always False while torch.distributed.tensor is not imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)
