"""The native CPU kernel: attention over intervals of keys in C++, an optional shared library."""

from sightline.native.kernel import attention_backward, attention_forward, pack_intervals
from sightline.native.library import describe, why_missing

__all__ = ["attention_backward", "attention_forward", "describe", "pack_intervals", "why_missing"]
