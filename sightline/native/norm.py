"""Call the native kernel of RMSNorm with float32 tensors on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from sightline.native.library import check, get_library

NORM_BLOCKS = 64
"""SIGHTLINE_NORM_BLOCKS in csrc/norm.h."""


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last dim: output [..., W], and the factor of each row [N].

    x       [..., W] with N rows, of any strides
    weight  [W]

    Raises:
        ValueError: if the arguments do not fit each other.
    """
    _check_float32(x=x, weight=weight)
    if weight.dim() != 1 or x.dim() == 0 or x.shape[-1] != len(weight) or len(weight) == 0:
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"native norm: expected x [..., W] and weight [W], W > 0, got {shapes}")
    rows, weight = _rows(x), weight.contiguous()
    out, rstd = empty_outputs(x)
    check(
        get_library().sightline_rms_norm_forward(
            rows.data_ptr(), rows.stride(0), weight.data_ptr(), *rows.shape, eps, out.data_ptr(), rstd.data_ptr()
        )
    )
    return out, rstd


def rms_norm_backward(d_out: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x [..., W] and weight [W] from that of the output and the factors of the rows."""
    _check_float32(d_out=d_out, x=x, weight=weight, rstd=rstd)
    rows, d_out, weight, rstd = _rows(x), d_out.contiguous(), weight.contiguous(), rstd.contiguous()
    if d_out.shape != x.shape or rstd.shape != rows.shape[:1] or weight.shape != rows.shape[1:]:
        shapes = [tuple(t.shape) for t in (d_out, x, weight, rstd)]
        raise ValueError(f"native norm: expected d_out and x [..., W], weight [W] and one rstd per row, got {shapes}")
    d_x, d_weight = torch.empty_like(d_out), torch.empty_like(weight)
    partial = weight.new_empty(NORM_BLOCKS, len(weight))
    check(
        get_library().sightline_rms_norm_backward(
            d_out.data_ptr(), rows.data_ptr(), rows.stride(0), weight.data_ptr(), rstd.data_ptr(), *rows.shape,
            d_x.data_ptr(), d_weight.data_ptr(), partial.data_ptr(),
        )
    )  # fmt: skip
    return d_x, d_weight


def empty_outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate the output [..., W], contiguous, and the factor of each row [N]."""
    return x.new_empty(x.shape), x.new_empty(x.numel() // x.shape[-1])


def _check_float32(**tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(f"native norm: expected {name} float32 on the CPU, got {x.dtype} on {x.device}")


def _rows(x: Tensor) -> Tensor:
    """Return `x` as [N, W] with contiguous rows; a copy only where strides require it."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
