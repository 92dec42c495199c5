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
    weight  [E, F, W], or [F, W] for one group
    bias    [E, F], or [F] for one group
    counts  int64 [E], rows in each group, at most M together; None for one group. Rows after the last group are not set

    Raises:
        ValueError: if the arguments do not fit each other.
    """
    grouped = weight.dim() == 3
    groups = weight.shape[0] if grouped else 1
    features, channels = weight.shape[-2:]
    fits = x.dim() == 2 and x.shape[1] == channels >= MIN_CHANNELS and grouped == (counts is not None)
    for tensor, shape in ((bias, weight.shape[:-1]), (counts, (groups,))):
        fits = fits and (tensor is None or (tensor.shape == shape and tensor.device == x.device))
    fits = fits and (counts is None or counts.dtype == torch.int64) and x.is_cpu and weight.is_cpu
    if not fits or not x.dtype == weight.dtype == (x if bias is None else bias).dtype == torch.float32:
        described = [None if t is None else (tuple(t.shape), t.dtype, t.device) for t in (x, weight, bias, counts)]
        raise ValueError(
            f"native linear: expected x [M, W], weight [E, F, W], bias [E, F] in float32 and counts int64 [E] on the "
            f"CPU, W at least {MIN_CHANNELS}, got {described}"
        )
    x, weight, bias, counts = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (x, weight, bias, counts))
    out = x.new_empty(x.shape[0], features)
    arguments = ARGUMENTS.pack(
        x.data_ptr(), x.stride(0), x.shape[0],
        weight.data_ptr(), weight.stride(0) if grouped else 0, weight.stride(-2),
        0 if bias is None else bias.data_ptr(), bias.stride(0) if grouped and bias is not None else 0,
        0 if counts is None else counts.data_ptr(), groups, features, channels, out.data_ptr(),
    )  # fmt: skip
    check(get_library().sightline_linear(arguments))
    return out
