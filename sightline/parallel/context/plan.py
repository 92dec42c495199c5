"""plan_context: which rank owns which tokens of packed rows, which keys it needs, and which ranks send them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sightline.attention.tiles import TILE
from sightline.masks import AttentionMask, named_masks
from sightline.numbers import divisors, nearest
from sightline.parallel.context.orders import Costs, Piece, balanced, contiguous, headtail, roundrobin
from sightline.parallel.context.shard import ContextShard
from sightline.parallel.context.transfers import (
    Integers,
    KeyRanges,
    Pieces,
    Transfers,
    build_pieces,
    concatenate_ranges,
    find_key_ranges,
    find_transfers,
    offset_in_group,
)

TOLERANCE = 0.02  # in the balanced order, a rank may exceed the mean work by this fraction of it; 0.04 saves no keys
FIXED_ORDERS = {order.__name__: order for order in (contiguous, headtail, roundrobin)}
ORDERS = ("balanced", *FIXED_ORDERS)


@dataclass(frozen=True, eq=False)
class ContextPlan:
    """Result of `plan_context`: integers on the CPU, the same on every rank."""

    masks: Mapping[str, AttentionMask]
    degree: int
    pieces: Pieces
    key_ranges: Mapping[str, KeyRanges]
    transfers: Mapping[str, Transfers]

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S) of the planned rows."""
        return next(iter(self.masks.values())).shape[:2]

    def queries(self, rank: int) -> Tensor:
        """int64 [B, S / degree], ascending: the tokens of each row that this rank owns, as query and as key."""
        owned = self.pieces.rank == rank
        first, last = self.pieces.first[owned], self.pieces.last[owned]
        return torch.from_numpy(concatenate_ranges(first, last - first)).view(self.shape[0], -1)

    def work(self) -> Tensor:
        """int64 [degree]: visible pairs of each rank, summed over rows and masks (one layer per mask)."""
        starts = self.pieces.row * self.shape[1] + self.pieces.first
        total = np.zeros(self.degree, dtype=np.int64)
        for mask in self.masks.values():
            pairs = (mask.stop - mask.start).sum(dim=2).flatten().numpy()
            np.add.at(total, self.pieces.rank, np.add.reduceat(pairs, starts))
        return torch.from_numpy(total)

    def sent_keys(self) -> Tensor:
        """int64 [degree, degree]: keys that rank i sends to rank j, summed over rows and masks (one layer per mask)."""
        sent = np.zeros((self.degree, self.degree), dtype=np.int64)
        for transfers in self.transfers.values():
            np.add.at(sent, (transfers.source, transfers.target), transfers.length)
        np.fill_diagonal(sent, 0)
        return torch.from_numpy(sent)

    def received_keys(self) -> Tensor:
        """int64 [degree]: keys from other ranks, summed over rows and masks (one layer per mask)."""
        return self.sent_keys().sum(dim=0)

    def shard(self, rank: int, name: str | None = None, *, full_rows: bool = False) -> ContextShard:
        """Return the local mask of `rank` and the keys that it sends and receives in a layer with mask `name`.

        name       name of the mask; optional if the plan has only one
        full_rows  include the full mask and the tokens of all ranks, which recurrent layers need

        Raises:
            ValueError: if the plan has no such mask.
        """
        if name is None and len(self.masks) == 1:
            (name,) = self.masks
        if name is None or name not in self.masks:
            raise ValueError(f"the plan has no mask named {name!r}; its masks are {sorted(self.masks)}")
        key_ranges = KeyRanges(*(field[self.key_ranges[name].rank == rank] for field in self.key_ranges[name]))
        transfers = self.transfers[name]
        sends = Transfers(*(field[transfers.source == rank] for field in transfers))
        receives = Transfers(*(field[transfers.target == rank] for field in transfers))
        return ContextShard(
            mask=_reindex_keys(self.masks[name].take_queries(self.queries(rank)), key_ranges),
            send=self._indices_by_rank(sends.row, sends.target, sends.source_offset, sends.length),
            receive=self._indices_by_rank(receives.row, receives.source, receives.target_offset, receives.length),
            full_mask=self.masks[name] if full_rows else None,
            owned_tokens=torch.stack([self.queries(peer) for peer in range(self.degree)], dim=1) if full_rows else None,
        )

    def _indices_by_rank(self, row: Integers, rank: Integers, start: Integers, length: Integers) -> Tensor:
        """Return the indices of all runs, concatenated by row and rank: int64 [B, degree, M], padded with -1."""
        line = row * self.degree + rank
        offset = offset_in_group(line, length)
        width = int((offset + length).max(initial=1))
        lines = np.full((self.shape[0] * self.degree, width), -1)
        lines[np.repeat(line, length), concatenate_ranges(offset, length)] = concatenate_ranges(start, length)
        return torch.from_numpy(lines).view(self.shape[0], self.degree, width)


def plan_context(
    masks: AttentionMask | Mapping[str, AttentionMask],
    degree: int,
    order: str = "balanced",
    *,
    layers: Mapping[str, int] | int = 1,
) -> ContextPlan:
    """Shard the tokens of packed rows across `degree` ranks and plan the exchange of keys.

    masks   self-attention masks of one shape: a single mask, named "attention", or several by name
    order   "balanced", "contiguous", "headtail" or "roundrobin"; see `orders`
    layers  number of layers that use each mask: the weight of its visible pairs in the balanced order

    Raises:
        ValueError: if the degree does not divide the row length, the masks differ in shape, or the order is unknown.
    """
    named = named_masks(masks)
    _check(named, degree, order, layers)
    named = {name: mask.cpu() for name, mask in named.items()}
    weights = {name: layers if isinstance(layers, int) else layers[name] for name in named}
    rows, length, _ = next(iter(named.values())).shape
    if order == "balanced":
        pieces = build_pieces(_balanced_rows(named, weights, degree))
    else:
        pieces = build_pieces([FIXED_ORDERS[order](length, degree)] * rows)
    key_ranges = {name: find_key_ranges(mask, pieces) for name, mask in named.items()}
    transfers = {name: find_transfers(ranges, pieces, length) for name, ranges in key_ranges.items()}
    return ContextPlan(named, degree, pieces, key_ranges, transfers)


def _check(masks: Mapping[str, AttentionMask], degree: int, order: str, layers: Mapping[str, int] | int) -> None:
    if not masks:
        raise ValueError("plan_context needs at least one mask, got none")
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; the orders are {', '.join(ORDERS)}")
    if degree < 1:
        raise ValueError(f"the context degree must be at least 1, got {degree}")
    shapes = {name: mask.shape for name, mask in masks.items()}
    rows, length, _ = next(iter(shapes.values()))
    if any(shape != (rows, length, length) for shape in shapes.values()):
        raise ValueError(
            f"all masks of a plan must have one shape (B, Q, T) with Q = T, got {shapes}; "
            "leave out masks of other sequences, such as an encoder's"
        )
    if length % degree:
        below, above = length // degree * degree, -(-length // degree) * degree
        lengths = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"rows of {length} tokens are not divisible by {degree} context ranks; nearest lengths: {lengths}; "
            f"nearest degrees: {nearest(degree, divisors(length))}"
        )
    if not isinstance(layers, int) and set(layers) != set(masks):
        raise ValueError(f"layers has the names {sorted(layers)}; expected those of the masks, {sorted(masks)}")


def _balanced_rows(masks: Mapping[str, AttentionMask], weights: Mapping[str, int], degree: int) -> list[list[Piece]]:
    """Return the balanced order of each row. The tolerance is a fraction of the mean work of all rows.

    A cut before a token costs the earlier keys that the token attends to: they are sent to the rank that owns it.
    """
    rows, length, _ = next(iter(masks.values())).shape
    work, cut_keys = torch.zeros(2, rows, length, dtype=torch.int32)  # layers x S at most, far from 2^31
    token = torch.arange(length, dtype=torch.int32)[:, None]
    for name, mask in masks.items():
        work.add_(_count_keys(mask.start, mask.stop), alpha=weights[name])
        cut_keys.add_(_count_keys(mask.start.minimum(token), mask.stop.minimum(token)), alpha=weights[name])
    work_before = np.zeros((rows, length + 1), dtype=np.int64)
    np.cumsum(work.numpy(), axis=1, out=work_before[:, 1:])
    falls = (cut_keys[:, 1:] < cut_keys[:, :-1]).numpy()
    slack = TOLERANCE * float(work_before[:, -1].mean()) / degree
    return [
        balanced(
            Costs(work_before[row].data, cut_keys[row].numpy().data, (falls[row].nonzero()[0] + 1).data), degree, slack
        )
        for row in range(rows)
    ]


def _count_keys(start: Tensor, stop: Tensor) -> Tensor:
    """Keys in the intervals of each query: int32 [B, Q]."""
    keys = stop - start
    return keys[..., 0] if keys.shape[2] == 1 else keys.sum(dim=2, dtype=torch.int32)


def received_length(needed: int, local: int) -> int:
    """Return T for `needed` keys: a multiple of a quarter of the `local` tokens, itself rounded up to tiles of 128.

    Kernels are then called with at most 4 x degree different lengths, so compiled kernels are reused.
    """
    step = -(-local // (4 * TILE)) * TILE
    return max(1, -(-needed // step)) * step


def _reindex_keys(mask: AttentionMask, key_ranges: KeyRanges) -> AttentionMask:
    """Return the mask of one rank with its keys numbered among those that the rank needs.

    Each interval lies within one of the rank's `key_ranges`.
    """
    rows, local, _ = mask.shape
    stride = mask.key_length + 1
    start, stop = mask.start.numpy(), mask.stop.numpy()
    visible = stop > start
    keys = start + np.arange(rows)[:, None, None] * stride
    index = np.searchsorted(key_ranges.row * stride + key_ranges.first, keys, side="right") - 1
    shift = np.append(key_ranges.offset - key_ranges.first, 0)[index]
    needed = int((key_ranges.offset + key_ranges.last - key_ranges.first).max(initial=0))
    return AttentionMask.from_intervals(
        torch.from_numpy(np.where(visible, start + shift, 0)),
        torch.from_numpy(np.where(visible, stop + shift, 0)),
        received_length(needed, local),
    )
