"""Rotary position embedding (RoPE, arXiv 2104.09864), computed from the `positions` of a batch.

Channels i and i + D/2 of a head form a pair, as in Hugging Face weights, which therefore load without permutation
(Meta's weights pair channels 2i and 2i + 1). RoPE rotates pair i at position p by the angle p * frequency_i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from sightline.config.checks import check_values


@dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Llama 3.1's RoPE scaling for longer contexts: lower the low frequencies and keep the high frequencies."""

    factor: float = 8.0
    """Divisor of the low frequencies."""
    low_freq_factor: float = 1.0
    """Frequencies with fewer rotations than this over the original context are divided by the full factor."""
    high_freq_factor: float = 4.0
    """Frequencies with more rotations than this over the original context are kept; those between are interpolated."""
    original_context: int = 8192
    """Original context length in tokens, before scaling."""

    rotation_factor: ClassVar[float] = 1.0
    """Factor of cosine and sine."""

    def __post_init__(self) -> None:
        check_values(self, "rope-scaling")
        if self.factor < 1:
            raise ValueError(f"rope-scaling.factor must be at least 1 (1 changes nothing), got {self.factor}")
        if not 0 < self.low_freq_factor <= self.high_freq_factor:
            raise ValueError(
                "rope-scaling needs 0 < low-freq-factor <= high-freq-factor (Llama 3.1 has 1 and 4), "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )
        if self.original_context < 1:
            raise ValueError(f"rope-scaling.original-context must be at least 1 token, got {self.original_context}")


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN's RoPE scaling for longer contexts (arXiv 2309.00071), which also scales the attention scores.

    The score scaling has two parts: `rotation_factor` goes to `build_rotation` and affects only channels with RoPE;
    `score_factor` multiplies the scale of the scores and also affects channels without RoPE (DeepSeek V3).
    """

    factor: float = 32.0
    """Divisor of the low frequencies."""
    beta_fast: float = 32.0
    """Frequencies with more rotations than this over the original context are kept."""
    beta_slow: float = 1.0
    """Frequencies with fewer rotations than this over the original context are divided by the full factor;
    those between are interpolated linearly over the channels."""
    original_context: int = 4096
    """Original context length in tokens, before scaling."""
    truncate: bool = True
    """Round the ends of the interpolated range to integer channels (DeepSeek V3 does, gpt-oss does not)."""
    mscale: float = 1.0
    """Queries and keys with RoPE are multiplied by 1 + 0.1 mscale ln(factor) ..."""
    mscale_all_dim: float = 0.0
    """... and divided by 1 + 0.1 mscale-all-dim ln(factor); the scores are multiplied by the square of this divisor."""

    def __post_init__(self) -> None:
        check_values(self, "rope-scaling")
        if self.factor < 1:
            raise ValueError(f"rope-scaling.factor must be at least 1 (1 changes nothing), got {self.factor}")
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                "rope-scaling needs 0 < beta-slow < beta-fast (the paper has 1 and 32), "
                f"got {self.beta_slow} and {self.beta_fast}"
            )
        if self.original_context < 1:
            raise ValueError(f"rope-scaling.original-context must be at least 1 token, got {self.original_context}")

    @property
    def rotation_factor(self) -> float:
        """Factor of cosine and sine."""
        return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)

    @property
    def score_factor(self) -> float:
        """Factor of the scale of the scores, which is usually D^-0.5."""
        return self._magnitude(self.mscale_all_dim) ** 2

    def _magnitude(self, mscale: float) -> float:
        return 1.0 + 0.1 * mscale * math.log(self.factor)


class Rotation(NamedTuple):
    """Cosine and sine for `rotate`: float32 [B, S, 1, D] each, computed once per forward and shared by all layers.

    The two halves of `cos` are equal. The first half of `sin` is negated, so that a rotation is
    `x * cos + swap_halves(x) * sin`.
    """

    cos: Tensor
    sin: Tensor


def rope_frequencies(
    head_dim: int,
    theta: float,
    scaling: Llama3RopeScaling | YarnScaling | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the frequency of each channel pair in radians per token: float32 [D/2], from 1 down to about 1 / theta."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    if isinstance(scaling, YarnScaling):
        ramp = _yarn_ramp(head_dim, theta, scaling, device)
    else:
        rotations = scaling.original_context * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        ramp = ((rotations - low) / max(high - low, 1e-6)).clamp(0, 1)  # equal factors give a step
    return frequencies * (ramp + (1 - ramp) / scaling.factor)


def _yarn_ramp(head_dim: int, theta: float, scaling: YarnScaling, device: torch.device | str) -> Tensor:
    """Return the unscaled share of each pair's frequency: float32 [D/2], falling from 1 to 0 along the pairs."""

    def fractional_pair(rotations: float) -> float:
        """Return the fractional index of the pair with this number of rotations over the original context."""
        return head_dim * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    first, last = fractional_pair(scaling.beta_fast), fractional_pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)  # not head_dim / 2 - 1: published models use head_dim - 1
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    return 1 - ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)


def build_rotation(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> Rotation:
    """positions int [B, S], frequencies float32 [D/2] -> Rotation. Angles are always float32.

    factor  multiplies cosine and sine: see `YarnScaling.rotation_factor`
    """
    angles = positions[:, :, None, None].float() * frequencies
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return Rotation(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the channel pairs of x [B, S, H, D]; computed in float32, returned in the dtype of x."""
    if not torch.is_grad_enabled():
        return _apply_rotation(x, rotation.cos, rotation.sin)
    return _Rotate.apply(x, rotation.cos, rotation.sin)


class _Rotate(torch.autograd.Function):
    """Rotation whose backward is the inverse rotation. It does not save x and allocates two temporaries, not six."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _apply_rotation(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _apply_rotation(grad, cos, -sin), None, None


def _apply_rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    swapped = torch.cat([second, first], dim=-1)
    return (x * cos).addcmul_(swapped, sin).to(x.dtype)
