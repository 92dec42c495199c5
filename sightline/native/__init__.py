"""The native CPU kernels in C++, an optional shared library: attention over intervals, RMSNorm, linear layers."""

from sightline.native.kernel import attention_backward, attention_forward, pack_intervals
from sightline.native.library import describe, why_missing
from sightline.native.linear import MIN_CHANNELS, few_tokens_linear

__all__ = [
    "MIN_CHANNELS",
    "attention_backward",
    "attention_forward",
    "describe",
    "few_tokens_linear",
    "pack_intervals",
    "why_missing",
]
