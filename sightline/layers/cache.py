"""What a layer remembers while text is generated."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of one layer for the tokens seen so far. Room is taken ahead and doubled when it runs out."""

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add new tokens [B, G, Q, D]; returns all keys and values so far, [B, G, T, D], without a copy."""
        begin, self.length = self.length, self.length + k.shape[2]
        self._keys = _put(self._keys, k, begin)
        self._values = _put(self._values, v, begin)
        return self._keys[:, :, : self.length], self._values[:, :, : self.length]


class RecurrentCache:
    """What a layer with a memory keeps of the tokens seen so far: the same, however many they are."""

    def __init__(self) -> None:
        self.state: Tensor | None = None
        """[B, H, D, E], the memory after the last token."""
        self._inputs: Tensor | None = None

    def append_inputs(self, x: Tensor, count: int) -> Tensor:
        """Add new tokens [B, S, C]; returns the `count` tokens before them, 0 where there were none."""
        past = x.new_zeros(x.shape[0], count, x.shape[2]) if self._inputs is None else self._inputs
        self._inputs = torch.cat([past, x], dim=1)[:, x.shape[1] :]
        return past


LayerCache = KeyValueCache | RecurrentCache
"""What a layer remembers; which of them, its own `new_cache` says."""


def _put(buffer: Tensor | None, new: Tensor, begin: int) -> Tensor:
    """Write `new` behind the first `begin` tokens of the buffer, into a larger one where it does not fit."""
    batch, heads, count, size = new.shape
    room = 0 if buffer is None else buffer.shape[2]
    if begin + count > room:
        larger = new.new_empty(batch, heads, max(2 * room, begin + count), size)
        if buffer is not None:
            larger[:, :, :begin] = buffer[:, :, :begin]
        buffer = larger
    assert buffer is not None
    buffer[:, :, begin : begin + count] = new
    return buffer
