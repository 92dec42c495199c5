"""Per-layer caches for generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of one layer for all tokens so far, in a buffer that at least doubles when it is full."""

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append new tokens [B, G, Q, D] and return all keys and values so far as views [B, G, T, D] of the buffer."""
        start, self.length = self.length, self.length + k.shape[2]
        self._keys = _write(self._keys, k, start)
        self._values = _write(self._values, v, start)
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]


class RecurrentCache:
    """State of a recurrent layer after the tokens so far. Its size does not depend on the number of tokens."""

    def __init__(self) -> None:
        self.state: Tensor | None = None
        """Recurrent state [B, H, D, E] after the last token."""
        self._inputs: Tensor | None = None

    def append_inputs(self, x: Tensor, count: int) -> Tensor:
        """Append new tokens [B, S, C] and return the `count` tokens before them, 0 before the first token."""
        past = x.new_zeros(x.shape[0], count, x.shape[2]) if self._inputs is None else self._inputs
        self._inputs = torch.cat([past, x], dim=1)[:, x.shape[1] :]
        return past


LayerCache = KeyValueCache | RecurrentCache
"""Cache of one layer, created by the layer's `new_cache`."""


def _write(buffer: Tensor | None, new: Tensor, start: int) -> Tensor:
    """Write `new` at index `start` of the buffer, or of a larger copy if it does not fit, and return that buffer."""
    batch, heads, count, size = new.shape
    capacity = 0 if buffer is None else buffer.shape[2]
    if start + count > capacity:
        larger = new.new_empty(batch, heads, max(2 * capacity, start + count), size)
        if buffer is not None:
            larger[:, :, :start] = buffer[:, :, :start]
        buffer = larger
    assert buffer is not None
    buffer[:, :, start : start + count] = new
    return buffer
