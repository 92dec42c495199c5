"""AttentionMask: the keys that each query attends to, as a few intervals of key indices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils import _pytree as pytree

from sightline.masks.block_mask import build_block_mask, build_mask_mod
from sightline.masks.intervals import canonical, from_dense
from sightline.masks.varlen import VarlenLayout, build_varlen

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Attention mask in which each query attends to the keys of at most K half-open intervals `[start, stop)`.

    start, stop  int32 [B, Q, K]
    key_length   T, the number of keys that the intervals index

    A mask is canonical: the intervals of a query are sorted, disjoint, not adjacent and not empty, unused ones are
    `[0, 0)` at the end, and K is the most that any query needs (at least 1). Two masks with the same visible pairs
    therefore have the same tensors. All rules and operators return canonical masks; `from_intervals` canonicalizes.

    A query whose intervals are all empty (padding) is fully masked: its output is exactly zero.
    """

    start: Tensor
    stop: Tensor
    key_length: int

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("stop", self.stop)):
            if value.dim() != 3 or value.dtype != torch.int32:
                raise ValueError(f"{name} must be int32 [B, Q, K], got {value.dtype} {tuple(value.shape)}")
        if self.start.shape != self.stop.shape:
            raise ValueError(f"start {tuple(self.start.shape)} and stop {tuple(self.stop.shape)} differ in shape")

    @classmethod
    def from_intervals(cls, start: Tensor, stop: Tensor, key_length: int) -> AttentionMask:
        """Build a mask from integers [B, Q, K]; intervals may be in any order, overlap, be adjacent or be empty."""
        return cls(*canonical(start.to(torch.int32), stop.to(torch.int32), key_length), key_length)

    @classmethod
    def from_dense(cls, dense: Tensor, *, max_intervals: int = 64) -> AttentionMask:
        """Convert a dense mask bool [B, Q, T], exactly.

        Raises:
            ValueError: if a query needs more than `max_intervals` intervals; the message states how many.
        """
        if dense.dim() != 3 or dense.dtype != torch.bool:
            raise ValueError(f"a dense mask must be bool [B, Q, T], got {dense.dtype} {tuple(dense.shape)}")
        return cls(*from_dense(dense, max_intervals), dense.shape[-1])

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: MaskMod,
        batch_size: int,
        query_length: int,
        key_length: int,
        *,
        max_intervals: int = 64,
        device: torch.device | str = "cpu",
    ) -> AttentionMask:
        """Convert a FlexAttention `mask_mod(b, h, q_idx, kv_idx) -> bool`, exactly. All heads share the mask: h is 0.

        The function is evaluated for every pair, a few million at a time: O(Q T) work, but not O(Q T) memory.

        Raises:
            ValueError: if a query needs more than `max_intervals` intervals; the message states how many.
        """
        rows = torch.arange(batch_size, device=device)[:, None, None]
        keys = torch.arange(key_length, device=device)[None, None, :]
        head = torch.zeros((), dtype=torch.int64, device=device)
        step = max(1, 2**23 // max(1, batch_size * key_length))
        parts = []
        for first in range(0, query_length, step):
            queries = torch.arange(first, min(first + step, query_length), device=device)[None, :, None]
            shape = (batch_size, queries.shape[1], key_length)
            parts.append(from_dense(mask_mod(rows, head, queries, keys).to(torch.bool).expand(shape), max_intervals))
        num_intervals = max((start.shape[2] for start, _ in parts), default=1)
        start, stop = (
            torch.cat([F.pad(bounds, (0, num_intervals - bounds.shape[2])) for bounds in side], dim=1)
            for side in zip(*parts, strict=True)
        )
        return cls(start, stop, key_length)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The mask's (B, Q, T)."""
        return self.start.shape[0], self.start.shape[1], self.key_length

    @property
    def intervals(self) -> int:
        """K, the most intervals that any query has (at least 1)."""
        return self.start.shape[2]

    @property
    def device(self) -> torch.device:
        return self.start.device

    def __repr__(self) -> str:
        rows, queries, keys = self.shape
        return f"AttentionMask(B={rows}, Q={queries}, T={keys}, K={self.intervals}, device={str(self.device)!r})"

    def __and__(self, other: AttentionMask) -> AttentionMask:
        """Intersection: the pairs visible in both masks."""
        self._check_same_shape(other, "&")
        start = torch.maximum(self.start[..., :, None], other.start[..., None, :]).flatten(2)
        stop = torch.minimum(self.stop[..., :, None], other.stop[..., None, :]).flatten(2)
        return AttentionMask(*canonical(start, stop, self.key_length), self.key_length)

    def __or__(self, other: AttentionMask) -> AttentionMask:
        """Union: the pairs visible in either mask."""
        self._check_same_shape(other, "|")
        start = torch.cat([self.start, other.start], dim=2)
        stop = torch.cat([self.stop, other.stop], dim=2)
        return AttentionMask(*canonical(start, stop, self.key_length), self.key_length)

    def _check_same_shape(self, other: AttentionMask, sign: str) -> None:
        if not isinstance(other, AttentionMask):
            raise TypeError(f"expected an AttentionMask on the right of {sign}, got {type(other).__name__}")
        if self.shape != other.shape:
            raise ValueError(
                f"masks of different shape cannot be combined: (B, Q, T) = {self.shape} {sign} {other.shape}; "
                "build both for the same rows, queries and keys"
            )

    def equal(self, other: AttentionMask) -> bool:
        """Return whether both masks have the same visible pairs; canonical masks are compared tensor by tensor."""
        same = self.key_length == other.key_length and self.start.shape == other.start.shape
        return same and torch.equal(self.start, other.start) and torch.equal(self.stop, other.stop)

    def __getitem__(self, rows: int | slice | Tensor | list[int]) -> AttentionMask:
        """Select rows. The batch dimension is kept: `mask[0]` has B = 1."""
        if isinstance(rows, int):
            if not -self.shape[0] <= rows < self.shape[0]:
                raise IndexError(f"row {rows} is out of range for a mask with {self.shape[0]} rows")
            rows = [rows]
        return self._selection(self.start[rows], self.stop[rows])

    def take_queries(self, index: Tensor) -> AttentionMask:
        """Select queries; the keys stay the same. A context-parallel rank takes the queries of its tokens.

        index: int64 [Q'], the same queries of every row, or [B, Q'], separate queries for each row.
        """
        if index.dim() == 1:
            return self._selection(self.start[:, index], self.stop[:, index])
        if index.dim() != 2 or index.shape[0] != self.shape[0]:
            raise ValueError(f"index must be [Q'] or [B, Q'] with B={self.shape[0]}, got {tuple(index.shape)}")
        index_BQK = index[:, :, None].expand(-1, -1, self.intervals)
        return self._selection(self.start.gather(1, index_BQK), self.stop.gather(1, index_BQK))

    def _selection(self, start: Tensor, stop: Tensor) -> AttentionMask:
        """Build the mask of a selection, which may need fewer intervals per query."""
        if start.shape[2] > 1:
            needed = max(1, int((stop > start).sum(dim=2).max())) if start.numel() else 1
            start, stop = start[:, :, :needed], stop[:, :, :needed]
        return AttentionMask(start, stop, self.key_length)

    def to(self, device: torch.device | str) -> AttentionMask:
        """Copy the mask to a device, without waiting for the copy."""
        return AttentionMask(
            self.start.to(device, non_blocking=True), self.stop.to(device, non_blocking=True), self.key_length
        )

    def cpu(self) -> AttentionMask:
        """Return the mask on the CPU: itself, or a copy that costs one synchronization with its device."""
        if self.device.type == "cpu":
            return self
        start, stop = torch.stack([self.start, self.stop]).cpu()
        return AttentionMask(start, stop, self.key_length)

    def validate(self) -> None:
        """Check that all intervals are canonical and in range.

        Raises:
            ValueError: if one is not.
        """
        start, stop = self.start, self.stop
        nonempty = stop > start
        valid = (start >= 0) & (stop >= start) & (stop <= self.key_length)
        if self.intervals > 1:
            valid[..., 1:] &= ~nonempty[..., 1:] | (nonempty[..., :-1] & (start[..., 1:] > stop[..., :-1]))
        if not bool(valid.all()):
            raise ValueError("the intervals of the mask are not canonical; build it with AttentionMask.from_intervals")

    def visible_queries(self) -> Tensor:
        """Return bool [B, Q]: true for queries that attend to at least one key, false for fully masked ones."""
        return self.stop[..., 0] > self.start[..., 0]

    def visible_pairs(self) -> Tensor:
        """Count the visible (query, key) pairs of each row: int64 [B].

        The forward pass of attention costs four FLOPs per pair, head and channel.
        """
        return (self.stop - self.start).sum(dim=(1, 2), dtype=torch.int64)

    def to_dense(self) -> Tensor:
        """Return the dense mask bool [B, Q, T], the reference for all other conversions. O(B Q T) memory."""
        keys = torch.arange(self.key_length, dtype=torch.int32, device=self.device)
        dense = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        for start, stop in zip(self.start.unbind(2), self.stop.unbind(2), strict=True):
            dense |= (keys >= start[..., None]) & (keys < stop[..., None])
        return dense

    @property
    def mask_mod(self) -> MaskMod:
        """FlexAttention `mask_mod`, the same function for every mask: `any_k(start[b, q, k] <= kv < stop[b, q, k])`."""
        return build_mask_mod(self.start, self.stop)

    def to_block_mask(self, block_size: int | tuple[int, int] = 128, *, compute_q_blocks: bool = True) -> BlockMask:
        """Return FlexAttention's BlockMask in O(S K + blocks), equal to `create_block_mask(self.mask_mod, ...)`.

        block_size        tokens per block, or (queries, keys) per block; lengths need not be multiples of it
        compute_q_blocks  also build the query blocks of each key block, which the backward pass needs
        """
        return build_block_mask(self.start, self.stop, self.key_length, block_size, compute_q_blocks)

    def to_varlen(self) -> VarlenLayout:
        """Return cu_seqlens and window for variable-length attention kernels.

        Raises:
            ValueError: if varlen kernels cannot express this mask; the message names a query and the reason.
        """
        return build_varlen(self.start, self.stop, self.key_length)


def named_masks(masks: Any) -> dict[str, Any]:
    """Return masks as a dict by name; a single mask gets the name `attention`."""
    return dict(masks) if isinstance(masks, Mapping) else {"attention": masks}


def _flatten(mask: AttentionMask) -> tuple[list[Tensor], int]:
    return [mask.start, mask.stop], mask.key_length


def _flatten_with_keys(mask: AttentionMask) -> tuple[list[tuple[pytree.KeyEntry, Tensor]], int]:
    return [(pytree.GetAttrKey("start"), mask.start), (pytree.GetAttrKey("stop"), mask.stop)], mask.key_length


def _unflatten(leaves: list[Tensor], key_length: int) -> AttentionMask:
    # No validation: tree_map may replace the tensors by anything (shapes, chunk specs, None).
    mask = object.__new__(AttentionMask)
    object.__setattr__(mask, "start", leaves[0])
    object.__setattr__(mask, "stop", leaves[1])
    object.__setattr__(mask, "key_length", key_length)
    return mask


# As a pytree of tensors with B first, a mask is split into micro-batches by torch.distributed.pipelining.
pytree.register_pytree_node(
    AttentionMask,
    _flatten,
    _unflatten,  # type: ignore[arg-type]
    serialized_type_name="sightline.masks.AttentionMask",
    flatten_with_keys_fn=_flatten_with_keys,  # type: ignore[arg-type]
)
