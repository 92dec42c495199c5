"""The native CPU kernels in C++, an optional shared library: attention over intervals of keys, and RMSNorm."""

from sightline.native.kernel import attention_backward, attention_forward, pack_intervals
from sightline.native.library import describe, why_missing

__all__ = ["attention_backward", "attention_forward", "describe", "pack_intervals", "why_missing"]
