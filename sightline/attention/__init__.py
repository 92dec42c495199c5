"""Attention that honours a mask exactly, whatever the kernel."""

from sightline.attention.attend import Lowered, attend, choose_backend, lower

__all__ = ["Lowered", "attend", "choose_backend", "lower"]
