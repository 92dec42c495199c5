"""Grouped matrix products: rows sorted by group, multiplied by one weight per group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.layers.linear import FEW_TOKENS, has_native, is_plain_float32, linear
from sightline.native import few_tokens_linear
from sightline.precision import autocast_dtype
from sightline.torch_private import disable_compiler

Layer = tuple[Tensor, Tensor | None]
"""weight [E, F, W], bias [E, F]"""


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return weight[g] @ x[i] + bias[g] for each row i of x, where g is its group: [M, F].

    x       [M, W], the rows of group 0, then the rows of group 1, ...
    weight  [E, F, W], bias [E, F]
    counts  int64 [E], rows in each group; rows of x after the last group give 0 and get no gradient
    """
    return grouped_linears(x, counts, (weight, bias))[0]


def grouped_linears(x: Tensor, counts: Tensor, *layers: Layer) -> tuple[Tensor, ...]:
    """Return `grouped_linear` of the same rows for each layer.

    Computing the layers together sums their gradients of x in place and reuses rows that are already in the cache.
    """
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
        layers = tuple((weight.to(dtype), None if bias is None else bias.to(dtype)) for weight, bias in layers)
    if all(_kernel_supports(x, weight) for weight, _ in layers):
        return tuple(_by_kernel(x, weight, counts, bias) for weight, bias in layers)
    return _by_group(x, counts, *layers)


def _kernel_supports(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch's grouped kernel applies: half precision on CUDA, rows of a multiple of 16 bytes."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return x.is_cuda and half and all(size % 8 == 0 for size in weight.shape[1:])


def _by_kernel(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None) -> Tensor:
    """One kernel for all groups, without waiting for `counts` to reach the CPU.

    The kernel leaves rows after the last group undefined, so they are set to zero and assigned to the last group.
    """
    ends = counts.cumsum(0)
    rows = torch.arange(len(x), device=x.device)
    trailing = (rows >= ends[-1])[:, None]
    offsets = torch.where(ends == ends[-1], len(x), ends).to(torch.int32)
    out = F.grouped_mm(x.masked_fill(trailing, 0), weight.transpose(1, 2), offs=offsets)
    if bias is not None:
        group = torch.searchsorted(offsets, rows, right=True)
        out = out + bias[group]
    return out.masked_fill(trailing, 0)


@disable_compiler  # every new `counts` would recompile
def _by_group(x: Tensor, counts: Tensor, *layers: Layer) -> tuple[Tensor, ...]:
    if not torch.is_grad_enabled():
        sizes = counts.tolist()
        if max(sizes) <= FEW_TOKENS and all(is_plain_float32(x, w) and has_native(x, w) for w, _ in layers):
            return tuple(_by_native(x, weight, counts, bias, sum(sizes)) for weight, bias in layers)
        return _without_gradients(x, sizes, *layers)
    return _ByGroup.apply(x, counts.tolist(), *(part for layer in layers for part in layer))


def _by_native(x: Tensor, weight: Tensor, counts: Tensor, bias: Tensor | None, used: int) -> Tensor:
    out = few_tokens_linear(x, weight, bias, counts)
    if used < len(x):
        out[used:] = 0
    return out


def _without_gradients(x: Tensor, counts: list[int], *layers: Layer) -> tuple[Tensor, ...]:
    """Return the products of each layer. Groups without rows cost nothing, which is most of them in generation."""
    groups = [group for group, count in enumerate(counts) if count]
    missing = len(x) - sum(counts)
    parts = x.split([*(counts[group] for group in groups), missing])
    outs = []
    for weight, bias in layers:
        biases = [None if bias is None else bias[group] for group in groups]
        out = [linear(part, weight[group], b) for part, group, b in zip(parts, groups, biases, strict=False)]
        if missing or not out:
            out.append(x.new_zeros(missing, weight.shape[1]))
        outs.append(torch.cat(out))
    return tuple(outs)


class _ByGroup(torch.autograd.Function):
    """One product per group, written directly into slices of the output.

    `split` and `cat` would copy every row again, and the backward of `unbind` would copy the weights' gradients.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int], *parts: Any) -> tuple[Tensor, ...]:
        weights, biases = parts[::2], parts[1::2]
        ctx.save_for_backward(x, *weights)
        ctx.counts = counts
        outs = tuple(x.new_empty(len(x), weight.shape[1]) for weight in weights)
        for group, rows in _slices(counts):
            for out, weight, bias in zip(outs, weights, biases, strict=True):
                if bias is None:
                    torch.mm(x[rows], weight[group].t(), out=out[rows])
                else:
                    torch.addmm(bias[group], x[rows], weight[group].t(), out=out[rows])
        for out in outs:
            out[sum(counts) :] = 0
        return outs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        need_x, _, *needs = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if need_x else None
        grad_weights = [torch.empty_like(w) if need else None for w, need in zip(weights, needs[::2], strict=True)]
        grad_biases = [w.new_empty(w.shape[:2]) if need else None for w, need in zip(weights, needs[1::2], strict=True)]
        for group, rows in _slices(ctx.counts, empty=True):  # the weights of an empty group get a gradient of 0
            for i, (grad, weight) in enumerate(zip(grads, weights, strict=True)):
                if grad_x is not None and i == 0:
                    torch.mm(grad[rows], weight[group], out=grad_x[rows])
                elif grad_x is not None:
                    grad_x[rows].addmm_(grad[rows], weight[group])
                if (grad_weight := grad_weights[i]) is not None:
                    torch.mm(grad[rows].t(), x[rows], out=grad_weight[group])
                if (grad_bias := grad_biases[i]) is not None:
                    torch.sum(grad[rows], dim=0, out=grad_bias[group])
        if grad_x is not None:
            grad_x[sum(ctx.counts) :] = 0
        return grad_x, None, *(grad for layer in zip(grad_weights, grad_biases, strict=True) for grad in layer)


def _slices(counts: list[int], *, empty: bool = False) -> Iterator[tuple[int, slice]]:
    """Yield each group that has rows, or with `empty` each group, with the slice of its rows."""
    start = 0
    for group, count in enumerate(counts):
        if count or empty:
            yield group, slice(start, start + count)
        start += count
