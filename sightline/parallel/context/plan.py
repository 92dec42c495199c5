"""plan_context: which rank owns which tokens of packed rows, which keys it needs, and which ranks send them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sightline.attention.tiles import TILE
from sightline.config import ParallelConfig
from sightline.masks import AttentionMask, named_masks
from sightline.numbers import divisors, nearest
from sightline.parallel.context.bound import least_keys
from sightline.parallel.context.orders import Costs, Piece, balanced, contiguous, headtail, roundrobin
from sightline.parallel.context.reassign import reassign
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

BALANCE = ParallelConfig.context_balance
START_TOLERANCE = 0.02  # the search starts with work at most this fraction above the mean, and then uses the rest
ROUNDS = 200  # of the search for a batch on up to 8 ranks: about 10 ms; more ranks have more pairs
MOST_ROUNDS = 400
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
    layers: Mapping[str, int]
    balance: float = BALANCE

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
            np.add.at(total, self.pieces.rank, np.add.reduceat(_pairs(mask).ravel(), starts))
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

    def least_keys(self, name: str | None = None) -> int:
        """Lower bound of the sum of `received_keys`, for one mask or for all, that follows from the balance limit.

        It holds for every plan in which no rank has more work of a row than the limit, or than a rank of this plan if
        that is more: a document with more work must be cut, and each later part needs the keys before it. See `bound`.
        """
        rows, length = self.shape
        names = list(self.masks) if name is None else [name]
        work = sum(layers * _pairs(self.masks[mask]) for mask, layers in self.layers.items())
        assert isinstance(work, np.ndarray)
        of_pieces = np.add.reduceat(work.ravel(), self.pieces.row * length + self.pieces.first)
        of_ranks = np.zeros((rows, self.degree))
        np.add.at(of_ranks, (self.pieces.row, self.pieces.rank), of_pieces)
        slack = (self.balance - 1) * of_ranks.mean()
        limits = np.maximum(of_ranks.mean(axis=1) + slack, of_ranks.max(axis=1))
        return sum(
            least_keys(self.masks[mask][row : row + 1], work[row], self.degree, limits[row])
            for mask in names
            for row in range(rows)
        )

    def _received_by_row(self, name: str) -> Integers:
        """int64 [B]: keys of one mask that all ranks receive from others, for each row."""
        transfers = self.transfers[name]
        received = np.zeros(self.shape[0], dtype=np.int64)
        np.add.at(received, transfers.row, transfers.length * (transfers.source != transfers.target))
        return received

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
    balance: float = BALANCE,
) -> ContextPlan:
    """Shard the tokens of packed rows across `degree` ranks and plan the exchange of keys.

    masks    self-attention masks of one shape: a single mask, named "attention", or several by name
    order    "balanced", "contiguous", "headtail" or "roundrobin"; see `orders`
    layers   number of layers that use each mask: the weight of its visible pairs in the balanced order
    balance  work that a rank may have in the balanced order, as a multiple of the mean: more of it saves keys. Single
             tokens with more work than that may exceed it

    Raises:
        ValueError: if the degree does not divide the row length, the masks differ in shape, the order is unknown, or
            balance is below 1.
    """
    named = named_masks(masks)
    _check(named, degree, order, layers, balance)
    named = {name: mask.cpu() for name, mask in named.items()}
    weights = {name: layers if isinstance(layers, int) else layers[name] for name in named}
    rows, length, _ = next(iter(named.values())).shape
    if order != "balanced":
        return _build_plan(named, [FIXED_ORDERS[order](length, degree)] * rows, degree, weights, balance)
    costs = _row_costs(named, weights)
    mean = sum(row.work_before[length] for row in costs) / rows / degree
    slack = (balance - 1) * mean
    start = [balanced(row, degree, min(slack, START_TOLERANCE * mean)) for row in costs]
    rounds = max(1, min(MOST_ROUNDS, ROUNDS * max(8, degree) // 8) // rows)
    improved = [
        reassign(pieces, row, degree, row.work_before[length] / degree + slack, rounds)
        for pieces, row in zip(start, costs, strict=True)
    ]
    # The costs of cuts are estimates, so count the keys, and keep the rows that do not receive fewer than at the start.
    plans = [_build_plan(named, orders, degree, weights, balance) for orders in (start, improved)]
    keys = [np.sum([weights[name] * plan._received_by_row(name) for name in named], axis=0) for plan in plans]
    fewer = keys[1] < keys[0]
    if fewer.all() or not fewer.any():
        return plans[int(fewer.all())]
    mixed = [improved[row] if fewer[row] else start[row] for row in range(rows)]
    return _build_plan(named, mixed, degree, weights, balance)


def _build_plan(
    masks: Mapping[str, AttentionMask],
    rows: list[list[Piece]],
    degree: int,
    layers: Mapping[str, int],
    balance: float,
) -> ContextPlan:
    """Return the plan of rows of the given orders."""
    pieces = build_pieces(rows)
    length = rows[0][-1][1]
    key_ranges = {name: find_key_ranges(mask, pieces) for name, mask in masks.items()}
    transfers = {name: find_transfers(ranges, pieces, length) for name, ranges in key_ranges.items()}
    return ContextPlan(masks, degree, pieces, key_ranges, transfers, layers, balance)


def _pairs(mask: AttentionMask) -> Integers:
    """Visible pairs of each query: int64 [B, Q]."""
    return (mask.stop - mask.start).sum(dim=2, dtype=torch.int64).numpy()


def _check(
    masks: Mapping[str, AttentionMask], degree: int, order: str, layers: Mapping[str, int] | int, balance: float
) -> None:
    if not masks:
        raise ValueError("plan_context needs at least one mask, got none")
    if order not in ORDERS:
        raise ValueError(f"unknown order {order!r}; the orders are {', '.join(ORDERS)}")
    if degree < 1:
        raise ValueError(f"the context degree must be at least 1, got {degree}")
    if not 1 <= balance < math.inf:
        raise ValueError(
            f"balance must be at least 1 and finite, got {balance}: it is the work that a rank may have, as a multiple "
            f"of the mean; the default is {BALANCE}"
        )
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


def _row_costs(masks: Mapping[str, AttentionMask], weights: Mapping[str, int]) -> list[Costs]:
    """Return the costs of the tokens of each row, weighted by layers.

    A cut before a token costs the earlier keys that the token attends to, which are sent to its rank, and the keys from
    there on that the token before it attends to.
    """
    rows, length, _ = next(iter(masks.values())).shape
    work, cut_keys = torch.zeros(2, rows, length, dtype=torch.int32)  # layers x S at most, far from 2^31
    token = torch.arange(length, dtype=torch.int32)[:, None]
    for name, mask in masks.items():
        work.add_(_count_keys(mask.start, mask.stop), alpha=weights[name])
        cut_keys.add_(_count_keys(mask.start.minimum(token), mask.stop.minimum(token)), alpha=weights[name])
        start, stop = mask.start[:, :-1].maximum(token[1:]), mask.stop[:, :-1].maximum(token[1:])
        cut_keys[:, 1:].add_(_count_keys(start, stop), alpha=weights[name])
    work_before = np.zeros((rows, length + 1), dtype=np.int64)
    np.cumsum(work.numpy(), axis=1, out=work_before[:, 1:])
    falls = (cut_keys[:, 1:] < cut_keys[:, :-1]).numpy()
    return [
        Costs(work_before[row].data, cut_keys[row].numpy().data, (falls[row].nonzero()[0] + 1).data)
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
