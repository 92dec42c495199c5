"""Per-layer caches for generation. A batch of texts has its last tokens in one column; shorter texts start later.

All caches have the same four operations besides `append`: `stack` joins the caches of several groups of rows, `select`
keeps some of the rows, and `drop_first` forgets the oldest columns that no later query attends to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of one layer, or other tensors [B, G, T, D], for the tokens so far.

    The buffers at least double when they are full, and only the tokens that are not dropped move to the new buffers:
    with a window, memory stays within a few windows, and the copies cost O(1) per token.
    """

    def __init__(self) -> None:
        self.first = 0
        """Number of dropped columns: the column of the first cached token."""
        self.length = 0
        """Number of cached columns, T."""
        self._buffers: tuple[Tensor, ...] = ()
        self._offset = 0  # index of the first cached token in the buffers

    def append(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Append new tokens [B, G, Q, D] and return the cached tokens as views [B, G, T, D] of the buffers."""
        count = new[0].shape[2]
        if not self._buffers:
            # No copy: the first call has the prompt, whose first tokens may be dropped before the next call.
            self._buffers, self.length = new, count
            return self.tensors()
        end = self._offset + self.length
        if end + count > self._buffers[0].shape[2]:
            self._move(max(2 * self.length, self.length + count))
            end = self.length
        for buffer, tensor in zip(self._buffers, new, strict=True):
            buffer[:, :, end : end + count] = tensor
        self.length += count
        return self.tensors()

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the cached tokens as views [B, G, T, D] of the buffers."""
        return tuple(buffer[:, :, self._offset : self._offset + self.length] for buffer in self._buffers)

    def drop_first(self, column: int) -> None:
        """Forget the tokens before a column."""
        count = column - self.first
        assert 0 <= count <= self.length, f"column {column} of {self.first} to {self.first + self.length}"
        self.first, self.length, self._offset = column, self.length - count, self._offset + count

    def select(self, rows: Tensor) -> None:
        """Keep the rows at these indices, int64 [B']."""
        self._buffers, self._offset = tuple(tensor.index_select(0, rows) for tensor in self.tensors()), 0

    @classmethod
    def stack(cls, caches: Sequence[KeyValueCache]) -> KeyValueCache:
        """Join the rows of several caches: their last columns become one; shorter ones get zeros on the left."""
        assert all(cache.first == 0 for cache in caches), "caches are joined before columns are dropped"
        joined, rows = cls(), [cache._buffers[0].shape[0] for cache in caches]
        joined.length = max(cache.length for cache in caches)
        buffers = []
        for parts in zip(*(cache.tensors() for cache in caches), strict=True):
            shape = sum(rows), parts[0].shape[1], 2 * joined.length, parts[0].shape[3]
            buffer = parts[0].new_empty(shape)
            for target, part in zip(buffer.split(rows), parts, strict=True):
                start = joined.length - part.shape[2]
                target[:, :, :start] = 0  # a masked key has the weight 0, but 0 * NaN is NaN
                target[:, :, start : joined.length] = part
            buffers.append(buffer)
        joined._buffers = tuple(buffers)
        return joined

    def _move(self, capacity: int) -> None:
        """Move the cached tokens to the start of new buffers."""
        buffers = []
        for tensor in self.tensors():
            buffer = tensor.new_empty(*tensor.shape[:2], capacity, tensor.shape[3])
            buffer[:, :, : self.length] = tensor
            buffers.append(buffer)
        self._buffers, self._offset = tuple(buffers), 0


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

    def drop_first(self, column: int) -> None:
        """Do nothing: the state has no columns."""

    def select(self, rows: Tensor) -> None:
        """Keep the rows at these indices, int64 [B']."""
        if self.state is not None and self._inputs is not None:
            self.state, self._inputs = self.state.index_select(0, rows), self._inputs.index_select(0, rows)

    @classmethod
    def stack(cls, caches: Sequence[RecurrentCache]) -> RecurrentCache:
        """Join the rows of several caches."""
        joined = cls()
        joined.state = torch.cat([cache.state for cache in caches if cache.state is not None])
        joined._inputs = torch.cat([cache._inputs for cache in caches if cache._inputs is not None])
        return joined


LayerCache = KeyValueCache | RecurrentCache
"""Cache of one layer, created by the layer's `new_cache`."""


def stack_caches(caches: Sequence[dict[str, LayerCache]]) -> dict[str, LayerCache]:
    """Join the rows of several caches {layer name: cache}."""
    if len(caches) == 1:
        return caches[0]
    joined: dict[str, LayerCache] = {}
    for name, first in caches[0].items():
        parts: list = [cache[name] for cache in caches]
        joined[name] = first.stack(parts)
    return joined
