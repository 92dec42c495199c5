"""AttentionMask: the keys that each query attends to, as a few intervals of key indices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils import _pytree as pytree

from sightline.masks.block_mask import build_block_mask
from sightline.masks.checks import check_bounds, check_canonical, check_index, check_size, describe
from sightline.masks.intervals import canonical, from_dense, intersect, to_dense, to_int32
from sightline.masks.mask_mod import PAIRS_PER_STEP, MaskMod, build_mask_mod, evaluate_mask_mod
from sightline.masks.varlen import VarlenLayout, build_varlen


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
        check_bounds(self.start, self.stop)
        if self.start.dtype != torch.int32 or self.stop.dtype != torch.int32 or self.start.shape[2] == 0:
            raise ValueError(
                f"start and stop must be int32 [B, Q, K] with K of at least 1, got {self.start.dtype} and "
                f"{self.stop.dtype} {tuple(self.start.shape)}; AttentionMask.from_intervals converts other integers"
            )
        check_size("key_length", self.key_length)

    @classmethod
    def from_intervals(cls, start: Tensor, stop: Tensor, key_length: int) -> AttentionMask:
        """Build a mask from integers [B, Q, K] of any width, which are clipped to the keys `[0, key_length)`.

        The intervals may be in any order, overlap, be adjacent or be empty.

        Raises:
            ValueError: if the bounds are not integer tensors [B, Q, K] of one shape on one device.
        """
        check_bounds(start, stop)
        check_size("key_length", key_length)
        return cls(*canonical(*to_int32(start, stop, key_length), key_length), key_length)

    @classmethod
    def from_dense(cls, dense: Tensor, *, max_intervals: int = 64) -> AttentionMask:
        """Convert a dense mask bool [B, Q, T], exactly.

        Raises:
            ValueError: if a query needs more than `max_intervals` intervals; the message states how many.
        """
        if not isinstance(dense, Tensor) or dense.dim() != 3 or dense.dtype != torch.bool:
            raise ValueError(f"a dense mask must be bool [B, Q, T], got {describe(dense)}")
        step = max(1, PAIRS_PER_STEP // max(1, dense.shape[0] * dense.shape[2]))
        return cls(*from_dense(dense.split(step, dim=1), max_intervals), dense.shape[2])

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
        """Convert a FlexAttention `mask_mod(b, h, q_idx, kv_idx) -> bool`, exactly.

        The function is evaluated under `torch.vmap` for every pair, as `create_mask` does, so it may index tables by
        its scalar arguments and reduce vectors. Blocks of queries of about two million pairs bound the memory.

        All heads share a mask, so the result must not be computed from h: such a function is refused even if it
        returns the same for all heads.

        Raises:
            ValueError: if the function uses h, does not return a scalar bool, or has control flow that depends on its
                arguments; if a query needs more than `max_intervals` intervals, the message states how many.
        """
        sizes = {"batch_size": batch_size, "query_length": query_length, "key_length": key_length}
        for name, size in sizes.items():
            check_size(name, size)
        if not callable(mask_mod):
            raise ValueError(f"mask_mod must be a function of (b, h, q_idx, kv_idx), got {describe(mask_mod)}")
        blocks = evaluate_mask_mod(mask_mod, (batch_size, query_length, key_length), device)
        return cls(*from_dense(blocks, max_intervals), key_length)

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
        bounds = intersect(self.start, self.stop, other.start, other.stop, self.key_length)
        return AttentionMask(*bounds, self.key_length)

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
        if self.device != other.device:
            raise ValueError(
                f"masks on different devices cannot be combined: {str(self.device)!r} {sign} {str(other.device)!r}; "
                "move one with .to(device)"
            )

    def equal(self, other: AttentionMask) -> bool:
        """Return whether both masks have the same visible pairs; canonical masks are compared tensor by tensor."""
        same = self.key_length == other.key_length and self.start.shape == other.start.shape
        return same and torch.equal(self.start, other.start) and torch.equal(self.stop, other.stop)

    def validate(self) -> None:
        """Check the values of the intervals, on which kernels rely when they index keys. O(Q K).

        No constructor reads values, since they may be on a device, which this function waits for.

        Raises:
            ValueError: if an interval is out of range, or a query's intervals are not canonical (sorted, disjoint, not
                adjacent, unused ones `[0, 0)` at the end); the message names the interval. K may exceed the need.
        """
        check_canonical(self.start, self.stop, self.key_length)

    def __getitem__(self, rows: int | slice | Tensor | list[int]) -> AttentionMask:
        """Select rows. The batch dimension is kept: `mask[0]` has B = 1."""
        if isinstance(rows, slice):
            return self._selection(self.start[rows], self.stop[rows])
        if isinstance(rows, int) and not isinstance(rows, bool):
            rows = [rows]
        if isinstance(rows, list) and not any(isinstance(row, bool) for row in rows):
            rows = torch.tensor(rows, dtype=torch.int64)
        index = check_index("row", rows, self.shape[0], self.device, allow_negative=True)
        if index.dim() != 1:
            raise ValueError(f"rows must be an int, a slice, a list or integers [R], got {describe(rows)}")
        return self._selection(self.start[index], self.stop[index])

    def take_queries(self, index: Tensor) -> AttentionMask:
        """Select queries; the keys stay the same. A context-parallel rank takes the queries of its tokens.

        index: int64 [Q'], the same queries of every row, or [B, Q'], separate queries for each row.
        """
        index = check_index("query", index, self.shape[1], self.device, allow_negative=False)
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

    def visible_queries(self) -> Tensor:
        """Return bool [B, Q]: true for queries that attend to at least one key, false for fully masked ones."""
        return self.stop[..., 0] > self.start[..., 0]

    def visible_pairs(self) -> Tensor:
        """Count the visible (query, key) pairs of each row: int64 [B].

        The forward pass of attention costs four FLOPs per pair, head and channel.
        """
        return (self.stop - self.start).sum(dim=(1, 2), dtype=torch.int64)

    def to_dense(self) -> Tensor:
        """Return the dense mask bool [B, Q, T], the reference for all other conversions. O(B Q (T + K))."""
        return to_dense(self.start, self.stop, self.key_length)

    @property
    def mask_mod(self) -> MaskMod:
        """FlexAttention `mask_mod`, the same function for every mask: `any_k(start[b, q, k] <= kv < stop[b, q, k])`.

        With more than 16 intervals, it is a second function, which reads a table of one bit per pair: B Q T / 8 bytes.
        """
        return build_mask_mod(self.start, self.stop, self.key_length)

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
