"""Grouped matrix products: rows sorted by group, and a weight for each group."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None) -> Tensor:
    """Row i of group g becomes weight[g] @ x[i] + bias[g].

    x       [M, W], the rows of group 0, then those of group 1, ...
    weight  [E, F, W], bias [E, F]
    counts  int64 [E], rows of each group; rows of x behind them all become 0 and take no gradient
    -> [M, F]
    """
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if _kernel_fits(x, weight):
        return _by_kernel(x, weight, counts, bias)
    return _ByGroup.apply(x, weight, bias, counts.tolist())


def _kernel_fits(x: Tensor, weight: Tensor) -> bool:
    """PyTorch's kernel is for half precision on CUDA and wants rows of whole 16 bytes."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and half and all(size % 8 == 0 for size in weight.shape[1:])


def _by_kernel(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
    """One kernel for all groups, which never waits for `counts` to reach the CPU.

    It leaves rows behind the last group undefined, so the last group takes them too, as zeros.
    """
    ends = counts.cumsum(0)
    rows = torch.arange(len(x), device=x.device)
    behind = (rows >= ends[-1])[:, None]
    offsets = torch.where(ends == ends[-1], len(x), ends).to(torch.int32)
    out = F.grouped_mm(x.masked_fill(behind, 0), weight.transpose(1, 2), offs=offsets)
    if bias is not None:
        group = torch.searchsorted(offsets, rows, right=True)
        out = out + bias[group]
    return out.masked_fill(behind, 0)


class _ByGroup(torch.autograd.Function):
    """A product for each group, written straight into its place: `split` and `cat` would copy every row once more,
    and `unbind` would stack the gradients of the weights anew."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out = x.new_empty(len(x), weight.shape[1])
        begin = 0
        for group, count in enumerate(counts):
            rows = slice(begin, begin := begin + count)
            if bias is None:
                torch.mm(x[rows], weight[group].t(), out=out[rows])
            else:
                torch.addmm(bias[group], x[rows], weight[group].t(), out=out[rows])
        out[begin:] = 0
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if need_x else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = weight.new_empty(weight.shape[:2]) if need_bias else None
        begin = 0
        for group, count in enumerate(ctx.counts):
            rows = slice(begin, begin := begin + count)
            if grad_x is not None:
                torch.mm(grad[rows], weight[group], out=grad_x[rows])
            if grad_weight is not None:
                torch.mm(grad[rows].t(), x[rows], out=grad_weight[group])
            if grad_bias is not None:
                torch.sum(grad[rows], dim=0, out=grad_bias[group])
        if grad_x is not None:
            grad_x[begin:] = 0
        return grad_x, grad_weight, grad_bias, None
