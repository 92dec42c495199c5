"""Rotary position embedding (arXiv 2104.09864), from the positions a batch states.

Channel i of a head and channel i + D/2 form a pair, as in the Hugging Face weights (Meta's own pair 2i with 2i + 1), so
those weights load unpermuted. A pair at position p is turned by the angle p * frequency_i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """How Llama 3.1 stretches RoPE to longer contexts: slow channels are slowed further, fast ones stay."""

    factor: float = 8.0
    """How much slower the slow channels turn."""
    low_freq_factor: float = 1.0
    """Channels that turn less often than this over the original context are slowed by the whole factor."""
    high_freq_factor: float = 4.0
    """Channels that turn more often than this over the original context stay; in between it is a straight line."""
    original_context: int = 8192
    """Tokens of the context before the stretch."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"rope-scaling.factor must be at least 1 (1 changes nothing), got {self.factor}")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                "rope-scaling needs 0 < low-freq-factor < high-freq-factor (Llama 3.1 has 1 and 4), "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )
        if self.original_context < 1:
            raise ValueError(f"rope-scaling.original-context must be at least 1 token, got {self.original_context}")


class Rotation(NamedTuple):
    """What `rotate` turns heads by: float32 [B, S, 1, D] each, made once per forward and shared by all layers.

    Both halves of `cos` are the same; the first half of `sin` is negated, so that a turn is
    `x * cos + swap_halves(x) * sin`.
    """

    cos: Tensor
    sin: Tensor


def rope_frequencies(
    head_size: int, theta: float, scaling: Llama3RopeScaling | None = None, *, device: torch.device | str = "cpu"
) -> Tensor:
    """Radians a token of each channel pair: float32 [D/2], from 1 down to about 1 / theta."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    turns = scaling.original_context * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def build_rotation(positions: Tensor, frequencies: Tensor) -> Rotation:
    """positions int [B, S], frequencies float32 [D/2] -> Rotation. Angles are float32 in every precision."""
    angles = positions[:, :, None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return Rotation(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the channel pairs of x [B, S, H, D]; computed in float32, returned in the dtype of x."""
    return _Rotate.apply(x, rotation.cos, rotation.sin)


class _Rotate(torch.autograd.Function):
    """Its backward is the turn back, so nothing of x is kept, and a turn writes two temporaries and not six."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat([second, first], dim=-1)
    return (x * cos).addcmul_(swapped, sin).to(x.dtype)
