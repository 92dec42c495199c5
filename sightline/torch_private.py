"""Private functions of PyTorch, some of which avoid importing slow parts of it. Tested with torch 2.11 to 2.13."""

from __future__ import annotations

import platform
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


def is_fake(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has a shape but no data: always False while no fake tensor can exist."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    return module is not None and isinstance(tensor, module.FakeTensor)


def in_transform(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Return whether a product of x and y is inside a transform of torch.func or a forward-mode derivative."""
    functorch = torch._C._functorch
    return (
        torch.autograd.forward_ad._current_level >= 0
        or functorch.peek_interpreter_stack() is not None
        or functorch.is_legacy_batchedtensor(x)
        or functorch.is_legacy_batchedtensor(y)
    )


def is_intercepted(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Return whether a product of x and y must be an operator of PyTorch: in a trace, a mode or a transform."""
    has_mode = torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None
    return has_mode or in_transform(x, y)


HAS_ONEDNN_LINEAR = (
    platform.machine() in ("x86_64", "AMD64")  # not tried on others
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
"""Whether `onednn_linear` can be called."""
ONEDNN_OPS = (torch.ops.mkldnn._linear_pointwise.default,) if HAS_ONEDNN_LINEAR else ()
"""The operator that `onednn_linear` calls, for selective recompute."""


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return F.linear(x, weight, bias), computed by oneDNN; without autograd."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
