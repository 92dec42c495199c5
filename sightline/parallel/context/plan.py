"""plan_context: who owns which tokens of packed rows, which keys each rank needs, and who sends what to whom."""

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
    count_up,
    find_key_ranges,
    find_transfers,
    offset_in_group,
)

TOLERANCE = 0.02  # of the mean work, by which the balanced order lets a rank pass it; 0.04 saves no keys
FIXED_ORDERS = {order.__name__: order for order in (contiguous, headtail, roundrobin)}
ORDERS = ("balanced", *FIXED_ORDERS)


@dataclass(frozen=True, eq=False)
class ContextPlan:
    """What `plan_context` found; see there. Pure integers on the CPU, the same on every rank."""

    masks: Mapping[str, AttentionMask]
    degree: int
    pieces: Pieces
    key_ranges: Mapping[str, KeyRanges]
    transfers: Mapping[str, Transfers]

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S) of the rows that were planned."""
        return next(iter(self.masks.values())).shape[:2]

    def queries(self, rank: int) -> Tensor:
        """int64 [B, S / degree], ascending: the tokens of each row that this rank owns, as query and as key."""
        mine = self.pieces.rank == rank
        first, last = self.pieces.first[mine], self.pieces.last[mine]
        return torch.from_numpy(count_up(first, last - first)).view(self.shape[0], -1)

    def work(self) -> Tensor:
        """int64 [degree]: pairs that each rank computes, summed over rows and masks (a layer of each)."""
        heads = self.pieces.row * self.shape[1] + self.pieces.first
        total = np.zeros(self.degree, dtype=np.int64)
        for mask in self.masks.values():
            pairs = (mask.stop - mask.start).sum(dim=2).flatten().numpy()
            np.add.at(total, self.pieces.rank, np.add.reduceat(pairs, heads))
        return torch.from_numpy(total)

    def sent_keys(self) -> Tensor:
        """int64 [degree, degree]: keys that rank i sends to rank j, summed over rows and masks (a layer of each)."""
        sent = np.zeros((self.degree, self.degree), dtype=np.int64)
        for transfers in self.transfers.values():
            np.add.at(sent, (transfers.source, transfers.rank), transfers.length)
        np.fill_diagonal(sent, 0)
        return torch.from_numpy(sent)

    def received_keys(self) -> Tensor:
        """int64 [degree]: keys that come from other ranks, summed over rows and masks (a layer of each)."""
        return self.sent_keys().sum(dim=0)

    def shard(self, rank: int, name: str | None = None, *, full_rows: bool = False) -> ContextShard:
        """What `rank` attends, sends and receives in a layer of mask `name`.

        name        of the mask; may be left out where only one was planned
        full_rows  also what recurrent layers need, which walk along whole rows

        Raises:
            ValueError: no such mask was planned.
        """
        if name is None and len(self.masks) == 1:
            (name,) = self.masks
        if name is None or name not in self.masks:
            raise ValueError(f"no mask named {name!r} was planned; there are {sorted(self.masks)}")
        needs = KeyRanges(*(side[self.key_ranges[name].rank == rank] for side in self.key_ranges[name]))
        transfers = self.transfers[name]
        out = Transfers(*(side[transfers.source == rank] for side in transfers))
        into = Transfers(*(side[transfers.rank == rank] for side in transfers))
        return ContextShard(
            mask=_renumbered(self.masks[name].take_queries(self.queries(rank)), needs),
            send=self._by_peer(out.row, out.rank, out.source_offset, out.length),
            receive=self._by_peer(into.row, into.source, into.target_offset, into.length),
            full_mask=self.masks[name] if full_rows else None,
            owned_tokens=torch.stack([self.queries(peer) for peer in range(self.degree)], dim=1) if full_rows else None,
        )

    def _by_peer(self, row: Integers, peer: Integers, begin: Integers, length: Integers) -> Tensor:
        """The numbers of all runs, in a line for each row and peer: int64 [B, degree, M]."""
        line = row * self.degree + peer
        place = offset_in_group(line, length)
        width = int((place + length).max(initial=1))
        lines = np.full((self.shape[0] * self.degree, width), -1)
        lines[np.repeat(line, length), count_up(place, length)] = count_up(begin, length)
        return torch.from_numpy(lines).view(self.shape[0], self.degree, width)


def plan_context(
    masks: AttentionMask | Mapping[str, AttentionMask],
    degree: int,
    order: str = "balanced",
    *,
    layers: Mapping[str, int] | int = 1,
) -> ContextPlan:
    """Divide packed rows among `degree` ranks.

    masks   what queries may see in self-attention: one mask, named "attention", or several by name, of one shape
    order   "balanced", "contiguous", "headtail" or "roundrobin"; see `orders`
    layers  how many layers use each mask: the balanced order weighs their pairs with it
    Errors: ValueError for rows that do not divide by the degree, masks that differ in shape, an unknown order.
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
    needs = {name: find_key_ranges(mask, pieces) for name, mask in named.items()}
    transfers = {name: find_transfers(need, pieces, length) for name, need in needs.items()}
    return ContextPlan(named, degree, pieces, needs, transfers)


def _check(masks: Mapping[str, AttentionMask], degree: int, order: str, layers: Mapping[str, int] | int) -> None:
    if not masks:
        raise ValueError("plan_context needs at least one mask, got none")
    if order not in ORDERS:
        raise ValueError(f"no order named {order!r}; there are {', '.join(ORDERS)}")
    if degree < 1:
        raise ValueError(f"a context degree is at least 1, got {degree}")
    shapes = {name: mask.shape for name, mask in masks.items()}
    rows, length, _ = next(iter(shapes.values()))
    if any(shape != (rows, length, length) for shape in shapes.values()):
        raise ValueError(
            f"masks planned together must have one shape with as many keys as queries, got (B, Q, T) = {shapes}; "
            "a mask of another sequence, such as an encoder's, is not planned"
        )
    if length % degree:
        below, above = length // degree * degree, -(-length // degree) * degree
        lengths = f"{below} or {above}" if below else f"{above}"
        raise ValueError(
            f"rows of {length} tokens do not divide among {degree} context ranks; nearest lengths: {lengths}; "
            f"nearest degrees: {nearest(degree, divisors(length))}"
        )
    if not isinstance(layers, int) and set(layers) != set(masks):
        raise ValueError(f"layers names {sorted(layers)}, the masks are {sorted(masks)}")


def _balanced_rows(masks: Mapping[str, AttentionMask], weights: Mapping[str, int], degree: int) -> list[list[Piece]]:
    """The balanced order of each row. What a rank may have too much of is measured by the mean row.

    A cut costs the keys that the token behind it sees before it, which must reach the rank that goes on from there.
    """
    rows, length, _ = next(iter(masks.values())).shape
    work, cut = torch.zeros(2, rows, length, dtype=torch.int32)  # layers x S at most, far from 2^31
    place = torch.arange(length, dtype=torch.int32)[:, None]
    for name, mask in masks.items():
        work.add_(_count(mask.start, mask.stop), alpha=weights[name])
        cut.add_(_count(mask.start.minimum(place), mask.stop.minimum(place)), alpha=weights[name])
    before = np.zeros((rows, length + 1), dtype=np.int64)
    np.cumsum(work.numpy(), axis=1, out=before[:, 1:])
    falls = (cut[:, 1:] < cut[:, :-1]).numpy()
    slack = TOLERANCE * float(before[:, -1].mean()) / degree
    return [
        balanced(Costs(before[row].data, cut[row].numpy().data, (falls[row].nonzero()[0] + 1).data), degree, slack)
        for row in range(rows)
    ]


def _count(start: Tensor, stop: Tensor) -> Tensor:
    """Keys in each query's intervals: int32 [B, Q]."""
    keys = stop - start
    return keys[..., 0] if keys.shape[2] == 1 else keys.sum(dim=2, dtype=torch.int32)


def received_length(needed: int, share: int) -> int:
    """T for `needed` keys: rounded up to a quarter of the rank's own tokens in whole tiles of 128.

    So kernels meet few lengths, 4 x degree at most, and a compiled kernel is found again.
    """
    step = -(-share // (4 * TILE)) * TILE
    return max(1, -(-needed // step)) * step


def _renumbered(mask: AttentionMask, needs: KeyRanges) -> AttentionMask:
    """The same pairs over the keys that one rank needs; every interval lies in one run of `needs`."""
    rows, share, _ = mask.shape
    stride = mask.key_length + 1
    start, stop = mask.start.numpy(), mask.stop.numpy()
    seen = stop > start
    keys = start + np.arange(rows)[:, None, None] * stride
    run = np.searchsorted(needs.row * stride + needs.first, keys, side="right") - 1
    shift = np.append(needs.offset - needs.first, 0)[run]
    needed = int((needs.offset + needs.last - needs.first).max(initial=0))
    return AttentionMask.from_intervals(
        torch.from_numpy(np.where(seen, start + shift, 0)),
        torch.from_numpy(np.where(seen, stop + shift, 0)),
        received_length(needed, share),
    )
