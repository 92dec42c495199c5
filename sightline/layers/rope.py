"""Rotary position embedding (arXiv 2104.09864), from the positions a batch states.

Channel i of a head and channel i + D/2 form a pair, as in the Hugging Face weights (Meta's own pair 2i with 2i + 1), so
those weights load unpermuted. A pair at position p is turned by the angle p * frequency_i.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

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

    rotation_factor: ClassVar[float] = 1.0
    """What cosine and sine are multiplied by."""

    def __post_init__(self) -> None:
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
    """YaRN's stretch of RoPE to longer contexts (arXiv 2309.00071), which also sharpens attention.

    Its correction of the attention scores is given away in two parts: `rotation_factor` for `build_rotation`, and
    `score_factor` for the scale of the scores, where also those channels are that do not rotate (DeepSeek V3).
    """

    factor: float = 32.0
    """How much slower the slow channels turn."""
    beta_fast: float = 32.0
    """Channels that turn more often than this over the original context stay."""
    beta_slow: float = 1.0
    """Channels that turn less often than this over the original context are slowed by the whole factor; in between it
    is a straight line over the channels."""
    original_context: int = 4096
    """Tokens of the context before the stretch."""
    truncate: bool = True
    """Begin and end the straight line at whole channels (DeepSeek V3 does, gpt-oss does not)."""
    mscale: float = 1.0
    """Rotated queries and keys are lengthened by 1 + 0.1 mscale ln(factor) each, ..."""
    mscale_all_dim: float = 0.0
    """... and shortened by 1 + 0.1 mscale-all-dim ln(factor), by which all channels are lengthened in the scores."""

    def __post_init__(self) -> None:
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
        """What cosine and sine are multiplied by."""
        return self._lengthened(self.mscale) / self._lengthened(self.mscale_all_dim)

    @property
    def score_factor(self) -> float:
        """What the scale of the scores, usually D^-0.5, is multiplied by."""
        return self._lengthened(self.mscale_all_dim) ** 2

    def _lengthened(self, mscale: float) -> float:
        return 1.0 + 0.1 * mscale * math.log(self.factor)


class Rotation(NamedTuple):
    """What `rotate` turns heads by: float32 [B, S, 1, D] each, made once per forward and shared by all layers.

    Both halves of `cos` are the same; the first half of `sin` is negated, so that a turn is
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
    """Radians a token of each channel pair: float32 [D/2], from 1 down to about 1 / theta."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    if isinstance(scaling, YarnScaling):
        kept = _kept_by_yarn(head_dim, theta, scaling, device)
    else:
        turns = scaling.original_context * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / max(high - low, 1e-6)).clamp(0, 1)  # equal factors: a step and not a line
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _kept_by_yarn(head_dim: int, theta: float, scaling: YarnScaling, device: torch.device | str) -> Tensor:
    """The share of each pair's frequency that stays: float32 [D/2], a line from 1 at fast pairs to 0 at slow ones."""

    def pair_of(turns: float) -> float:
        """The pair, in between two mostly, that turns so often over the original context."""
        return head_dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_of(scaling.beta_fast), pair_of(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)  # sic, not head_dim / 2 - 1: the models were trained so
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=device)
    return 1 - ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)


def build_rotation(positions: Tensor, frequencies: Tensor, factor: float = 1.0) -> Rotation:
    """positions int [B, S], frequencies float32 [D/2] -> Rotation. Angles are float32 in every precision.

    factor  what is turned is also lengthened by it: see `YarnScaling.rotation_factor`
    """
    angles = positions[:, :, None, None].float() * frequencies
    cos, sin = angles.cos() * factor, angles.sin() * factor
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
