"""Definition of PyTorch operators that call the native kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def define_operator(name: str, schema: str, function: Callable[..., Any]) -> Any:
    """Define the operator `sightline::NAME` with an implementation for the CPU, and return it."""
    qualified = f"sightline::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "cpu", function)
    return getattr(torch.ops.sightline, name).default
