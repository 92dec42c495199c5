"""Linear layers of few tokens by the native kernel: it reads a weight from memory at the speed of the memory."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from sightline.native.library import check, get_library

MIN_CHANNELS = 16
"""SIGHTLINE_MIN_CHANNELS in csrc/linear.h."""
ARGUMENTS = struct.Struct("13q")
"""Layout of `sightline_linear_arguments` in csrc/linear.h."""


def few_tokens_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
    """Return weight[g] x[i] + bias[g] for each row i of x, where g is its group: [M, F]. Without autograd.

    A row of the output does not depend on the other rows, not even by its rounding.

    x       [M, W], float32 on the CPU, W at least MIN_CHANNELS; the rows of group 0, then those of group 1, ...
    weight  [E, F, W], or [F, W] for one group; the last dimension is contiguous
    bias    [E, F], or [F] for one group
    counts  int64 [E], rows in each group, at most M together; None for one group. Rows after the last group are not set

    Raises:
        ValueError: if the arguments do not fit each other.
    """
    fits = x.dtype is weight.dtype is torch.float32 and x.is_cpu and weight.is_cpu and x.dim() == 2
    bias_pointer = bias_stride = counts_pointer = 0
    groups, (*_, features, channels) = 1, weight.shape
    if counts is not None:
        fits = fits and weight.dim() == 3 and counts.shape == weight.shape[:1] and counts.is_cpu
        fits = fits and counts.dtype is torch.int64 and counts.is_contiguous()
        groups, counts_pointer = len(counts), counts.data_ptr()
    elif weight.dim() != 2:
        fits = False
    if bias is not None:
        fits = fits and bias.dtype is torch.float32 and bias.is_cpu and bias.shape == weight.shape[:-1]
        bias = bias if bias.stride(-1) == 1 else bias.contiguous()
        bias_pointer, bias_stride = bias.data_ptr(), bias.stride(0)
    if not fits or x.shape[1] != channels or channels < MIN_CHANNELS or weight.stride(-1) != 1:
        described = [None if t is None else (tuple(t.shape), t.dtype, t.device) for t in (x, weight, bias, counts)]
        raise ValueError(
            "native linear: expected x [M, W], contiguous weight [E, F, W], bias [E, F] in float32, counts int64 [E] "
            f"on the CPU, W at least {MIN_CHANNELS}, got {described}"
        )
    x = x if x.stride(1) == 1 else x.contiguous()
    out = x.new_empty(x.shape[0], features)
    arguments = ARGUMENTS.pack(
        x.data_ptr(), x.stride(0), x.shape[0], weight.data_ptr(), weight.stride(0), weight.stride(-2),
        bias_pointer, bias_stride, counts_pointer, groups, features, channels, out.data_ptr(),
    )  # fmt: skip
    check(get_library().sightline_linear(arguments))
    return out
