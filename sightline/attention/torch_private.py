"""Private PyTorch operators used by the attention backends. Tested with torch 2.13.0."""

from __future__ import annotations

import sys

import torch

# PyTorch's fused CPU kernel and its backward; they take a float mask, and return and take the log-sum-exp.
flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def is_transformed(x: torch.Tensor) -> bool:
    """Return whether a tensor is inside a transform of torch.func (grad, vmap), or a batch of gradients."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x)


def varlen_forward(*args: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forward kernel of `torch.nn.attention.varlen.varlen_attn`: output, log-sum-exp and random state."""
    return torch.ops.torch_attn._varlen_attn(*args)


def varlen_backward(*args: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Backward kernel of `varlen_attn`: gradients of queries, keys and values."""
    return torch.ops.torch_attn._varlen_attn_backward(*args)


def mark_dynamic_size(x: torch.Tensor) -> None:
    """Let torch.compile treat the size of `x` [n] as a variable, without importing the compiler if nothing has yet."""
    compiler = sys.modules.get("torch._dynamo")
    if compiler is not None:
        compiler.maybe_mark_dynamic(x, 0)
