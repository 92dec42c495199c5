"""All private PyTorch APIs that this package uses, tested with torch 2.13.0: check here first after an upgrade."""

from __future__ import annotations

from torch import nn


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module or a part of it was compiled, by `torch.compile(module)` or `module.compile()`."""
    return any(
        hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None
        for part in module.modules()
    )
