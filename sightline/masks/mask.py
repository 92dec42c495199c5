"""AttentionMask: for each query the few runs of keys it sees, as data."""

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
    """What each query may see: the keys of its K half-open intervals `[start, stop)`.

    start, stop  int32 [B, Q, K]
    key_length   T, the number of keys the intervals index

    A mask is canonical: a query's intervals are sorted, none touches another, empty ones are dropped, what stays free
    is `[0, 0)` at the end, and K is as small as the neediest query allows (but at least 1). So equal masks are equal
    in data. The rules and the operators keep to this; `from_intervals` brings any intervals into this form.

    A query whose intervals are all empty (padding) sees nothing: its output is exactly zero.
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
        """From intervals in any order, overlapping, touching or empty: integers [B, Q, K]."""
        return cls(*canonical(start.to(torch.int32), stop.to(torch.int32), key_length), key_length)

    @classmethod
    def from_dense(cls, dense: Tensor, *, max_intervals: int = 64) -> AttentionMask:
        """From bool [B, Q, T], exactly.

        Errors: ValueError when a query needs more than `max_intervals` intervals; the text says how many.
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
        """From a FlexAttention `mask_mod(b, h, q_idx, kv_idx) -> bool`, exactly; h is 0, the mask of all heads.

        The function is asked about every pair, a few million at a time, so this costs O(Q T) work but not memory.
        Errors: ValueError when a query needs more than `max_intervals` intervals; the text says how many.
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
        width = max((start.shape[2] for start, _ in parts), default=1)
        start, stop = (
            torch.cat([F.pad(bounds, (0, width - bounds.shape[2])) for bounds in side], dim=1)
            for side in zip(*parts, strict=True)
        )
        return cls(start, stop, key_length)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, Q, T)."""
        return self.start.shape[0], self.start.shape[1], self.key_length

    @property
    def intervals(self) -> int:
        """K, the intervals the neediest query has."""
        return self.start.shape[2]

    @property
    def device(self) -> torch.device:
        return self.start.device

    def __repr__(self) -> str:
        rows, queries, keys = self.shape
        return f"AttentionMask(B={rows}, Q={queries}, T={keys}, K={self.intervals}, device={str(self.device)!r})"

    def __and__(self, other: AttentionMask) -> AttentionMask:
        """What both masks show."""
        self._check_joinable(other, "&")
        start = torch.maximum(self.start[..., :, None], other.start[..., None, :]).flatten(2)
        stop = torch.minimum(self.stop[..., :, None], other.stop[..., None, :]).flatten(2)
        return AttentionMask(*canonical(start, stop, self.key_length), self.key_length)

    def __or__(self, other: AttentionMask) -> AttentionMask:
        """What either mask shows."""
        self._check_joinable(other, "|")
        start = torch.cat([self.start, other.start], dim=2)
        stop = torch.cat([self.stop, other.stop], dim=2)
        return AttentionMask(*canonical(start, stop, self.key_length), self.key_length)

    def _check_joinable(self, other: AttentionMask, sign: str) -> None:
        if not isinstance(other, AttentionMask):
            raise TypeError(f"a mask joins with a mask, got {type(other).__name__} on the right of {sign}")
        if self.shape != other.shape:
            raise ValueError(
                f"masks of different shape cannot be joined: (B, Q, T) = {self.shape} {sign} {other.shape}; "
                "build both rules for the same rows, queries and keys"
            )

    def equal(self, other: AttentionMask) -> bool:
        """True when both show the same pairs; being canonical, they are compared as data."""
        same = self.key_length == other.key_length and self.start.shape == other.start.shape
        return same and torch.equal(self.start, other.start) and torch.equal(self.stop, other.stop)

    def __getitem__(self, rows: int | slice | Tensor | list[int]) -> AttentionMask:
        """The mask of some rows. B stays a dimension: `mask[0]` is a mask of one row."""
        if isinstance(rows, int):
            if not -self.shape[0] <= rows < self.shape[0]:
                raise IndexError(f"row {rows} of a mask with {self.shape[0]} rows")
            rows = [rows]
        return self._narrowed(self.start[rows], self.stop[rows])

    def take_queries(self, index: Tensor) -> AttentionMask:
        """The mask of some queries over the same keys.

        index: int64 [Q'], the same queries of every row, or [B, Q'], those of each row.
        """
        if index.dim() == 1:
            return self._narrowed(self.start[:, index], self.stop[:, index])
        if index.dim() != 2 or index.shape[0] != self.shape[0]:
            raise ValueError(f"index must be [Q'] or [B, Q'] with B={self.shape[0]}, got {tuple(index.shape)}")
        wide = index[:, :, None].expand(-1, -1, self.intervals)
        return self._narrowed(self.start.gather(1, wide), self.stop.gather(1, wide))

    def _narrowed(self, start: Tensor, stop: Tensor) -> AttentionMask:
        """Fewer rows or queries may need fewer intervals."""
        if start.shape[2] > 1:
            needed = max(1, int((stop > start).sum(dim=2).max())) if start.numel() else 1
            start, stop = start[:, :, :needed], stop[:, :, :needed]
        return AttentionMask(start, stop, self.key_length)

    def to(self, device: torch.device | str) -> AttentionMask:
        """The same mask on another device."""
        return AttentionMask(
            self.start.to(device, non_blocking=True), self.stop.to(device, non_blocking=True), self.key_length
        )

    def cpu(self) -> AttentionMask:
        """The same mask on the CPU: itself, or one read from the device it lies on."""
        if self.device.type == "cpu":
            return self
        start, stop = torch.stack([self.start, self.stop]).cpu()
        return AttentionMask(start, stop, self.key_length)

    def visible_queries(self) -> Tensor:
        """bool [B, Q]: queries that see at least one key; padding does not."""
        return self.stop[..., 0] > self.start[..., 0]

    def visible_pairs(self) -> Tensor:
        """int64 [B]: (query, key) pairs a row computes. Four FLOPs per pair, head and channel in the forward."""
        return (self.stop - self.start).sum(dim=(1, 2), dtype=torch.int64)

    def to_dense(self) -> Tensor:
        """bool [B, Q, T], the truth every other form is tested against. O(B Q T) memory."""
        keys = torch.arange(self.key_length, dtype=torch.int32, device=self.device)
        dense = torch.zeros(self.shape, dtype=torch.bool, device=self.device)
        for start, stop in zip(self.start.unbind(2), self.stop.unbind(2), strict=True):
            dense |= (keys >= start[..., None]) & (keys < stop[..., None])
        return dense

    @property
    def mask_mod(self) -> MaskMod:
        """FlexAttention's form, one function for all masks: `any_k(start[b, q, k] <= kv < stop[b, q, k])`."""
        return build_mask_mod(self.start, self.stop)

    def to_block_mask(self, block_size: int | tuple[int, int] = 128, *, compute_q_blocks: bool = True) -> BlockMask:
        """FlexAttention's BlockMask in O(S K + blocks), equal to `create_block_mask(self.mask_mod, ...)`.

        block_size         tokens of a block, or (of queries, of keys); lengths need not be multiples of it
        compute_q_blocks   the side the backward pass reads; without it the mask serves a forward only
        """
        return build_block_mask(self.start, self.stop, self.key_length, block_size, compute_q_blocks)

    def to_varlen(self) -> VarlenLayout:
        """cu_seqlens and window for varlen kernels.

        Errors: ValueError when varlen cannot say this mask; the text names the first query it fails at and why.
        """
        return build_varlen(self.start, self.stop, self.key_length)


def named_masks(masks: Any) -> dict[str, Any]:
    """Masks by name, as the package passes them on; a single mask is called `attention`."""
    return dict(masks) if isinstance(masks, Mapping) else {"attention": masks}


def _flatten(mask: AttentionMask) -> tuple[list[Tensor], int]:
    return [mask.start, mask.stop], mask.key_length


def _flatten_with_keys(mask: AttentionMask) -> tuple[list[tuple[pytree.KeyEntry, Tensor]], int]:
    return [(pytree.GetAttrKey("start"), mask.start), (pytree.GetAttrKey("stop"), mask.stop)], mask.key_length


def _unflatten(leaves: list[Tensor], key_length: int) -> AttentionMask:
    # No check: tree_map may put anything where the tensors were (shapes, chunk specs, None).
    mask = object.__new__(AttentionMask)
    object.__setattr__(mask, "start", leaves[0])
    object.__setattr__(mask, "stop", leaves[1])
    object.__setattr__(mask, "key_length", key_length)
    return mask


# As a pytree of tensors with B first, torch.distributed.pipelining splits a mask with its rows under every schedule.
pytree.register_pytree_node(
    AttentionMask,
    _flatten,
    _unflatten,  # type: ignore[arg-type]
    serialized_type_name="sightline.masks.AttentionMask",
    flatten_with_keys_fn=_flatten_with_keys,  # type: ignore[arg-type]
)
