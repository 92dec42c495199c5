"""Interval arithmetic on tensors: the vector operations behind every rule, operator and conversion of masks.

Each function costs O(S K), plus a sort of the K intervals of each query or of the S tokens of each row.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

INTERVALS_PER_STEP = 2**20  # bounds the memory of sorting and merging, which takes several int64 per interval


def to_int32(start: Tensor, stop: Tensor, key_length: int) -> tuple[Tensor, Tensor]:
    """Clip integer bounds of any size to `[0, key_length]` and cast them to int32, without wrapping.

    Raises:
        ValueError: if the bounds are not integers.
    """
    for name, bounds in (("start", start), ("stop", stop)):
        if bounds.dtype not in (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8):
            raise ValueError(
                f"{name} must be integers (key indices), got {bounds.dtype}; convert them with .long(), or pass a "
                "dense bool mask to AttentionMask.from_dense"
            )
    if start.dtype == stop.dtype == torch.int32:
        return start, stop  # canonical() clips
    start, stop = (bounds.to(torch.int64).clamp(0, key_length).to(torch.int32) for bounds in (start, stop))
    return start, stop


def canonical(start: Tensor, stop: Tensor, key_length: int) -> tuple[Tensor, Tensor]:
    """Sort and merge the intervals of each query, drop empty ones, and reduce K to the most that any query needs.

    start, stop: int32 [B, Q, K], in any order; may overlap, be adjacent, be empty or extend outside `[0, key_length)`.
    Returns int32 [B, Q, K'] each, with 1 <= K' <= max(K, 1).

        [4, 6) [0, 2) [2, 3) [5, 5)   ->   [0, 3) [4, 6)
    """
    if start.shape[2] == 0:
        start, stop = F.pad(start, (0, 1)), F.pad(stop, (0, 1))
    if start.shape[2] == 1:
        start, stop = start.clamp(min=0), stop.clamp(max=key_length)
        empty = stop <= start
        return start.masked_fill(empty, 0), stop.masked_fill(empty, 0)
    step = max(1, INTERVALS_PER_STEP // max(1, start.shape[0] * start.shape[2]))
    blocks = zip(start.split(step, dim=1), stop.split(step, dim=1), strict=True)
    return join_queries([_merge(*block, key_length) for block in blocks])


def _merge(start: Tensor, stop: Tensor, key_length: int) -> tuple[Tensor, Tensor]:
    """Implementation of `canonical` for K > 1."""
    start, stop = start.clamp(min=0), stop.clamp(max=key_length)
    empty = stop <= start
    # An empty interval is sorted last as [T, T): it is merged into an interval that ends at T, or dropped.
    start, order = start.masked_fill(empty, key_length).sort(dim=2)
    stop = stop.masked_fill(empty, key_length).gather(2, order)
    last_stop = stop.cummax(dim=2).values
    nonempty = start < key_length
    new = nonempty.clone()
    new[..., 1:] &= start[..., 1:] > last_stop[..., :-1]
    target = new.cumsum(dim=2) - 1
    needed = max(1, int(target[..., -1].max()) + 1) if target.numel() else 1
    target = target.masked_fill(~nonempty, needed)  # dropped intervals are scattered into an extra last column
    shape = (*start.shape[:2], needed + 1)
    merged_start = start.new_full(shape, key_length).scatter_reduce_(2, target, start, "amin")[..., :needed]
    merged_stop = stop.new_zeros(shape).scatter_reduce_(2, target, last_stop, "amax")[..., :needed]
    return merged_start.masked_fill(merged_start >= merged_stop, 0), merged_stop


def join_queries(blocks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Concatenate the intervals of consecutive blocks of queries, (start, stop) each, to the largest K of any block."""
    if len(blocks) == 1:
        return blocks[0]
    most = max(start.shape[2] for start, _ in blocks)
    start, stop = (
        torch.cat([F.pad(bounds, (0, most - bounds.shape[2])) for bounds in side], dim=1)
        for side in zip(*blocks, strict=True)
    )
    return start, stop


def intersect(
    start: Tensor, stop: Tensor, other_start: Tensor, other_stop: Tensor, key_length: int
) -> tuple[Tensor, Tensor]:
    """Return the canonical intersection of two sets of canonical intervals, int32 [B, Q, K1] and [B, Q, K2].

    A few intervals are intersected pair by pair, K1 K2 candidates; many by `a & b = ~(~a | ~b)`, which merges about
    K1 + K2 intervals twice.
    """
    first, second = start.shape[2], other_start.shape[2]
    if first * second <= 2 * (first + second + 2):
        low = torch.maximum(start[..., :, None], other_start[..., None, :]).flatten(2)
        high = torch.minimum(stop[..., :, None], other_stop[..., None, :]).flatten(2)
        return canonical(low, high, key_length)
    gaps = complement(start, stop, key_length), complement(other_start, other_stop, key_length)
    start, stop = (torch.cat(bounds, dim=2) for bounds in zip(*gaps, strict=True))
    return canonical(*complement(*canonical(start, stop, key_length), key_length), key_length)


def complement(start: Tensor, stop: Tensor, key_length: int) -> tuple[Tensor, Tensor]:
    """Return the gaps between canonical intervals int32 [B, Q, K]: int32 [B, Q, K + 1], sorted, some of them empty."""
    unused = stop <= start
    gap_start = F.pad(stop.masked_fill(unused, key_length), (1, 0))
    gap_stop = F.pad(start.masked_fill(unused, key_length), (0, 1), value=key_length)
    return gap_start, gap_stop


def find_runs(values: Tensor, query_values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the intervals of keys whose value equals the value that each query looks up.

    values        int [B, T], value of each key (the id of its document, span or image)
    query_values  int [B, Q], value that each query attends to; negative: none
    Returns start, stop: int32 [B, Q, K], K = the most runs that one value has in a row (1 for packed documents).

        values 7 7 5 5 7    query value 5  ->  [2, 4)    query value 7  ->  [0, 2) [4, 5)
    """
    values, order = values.sort(dim=1, stable=True)  # groups equal values, with their indices ascending
    query_values = query_values.to(values.dtype).contiguous()
    low = torch.searchsorted(values, query_values)
    high = torch.searchsorted(values, query_values, right=True)
    found = (query_values >= 0) & (high > low)
    # A run starts where the value changes or the key index is not the next one.
    starts = torch.ones_like(values, dtype=torch.bool)
    starts[:, 1:] = (values[:, 1:] != values[:, :-1]) | (order[:, 1:] != order[:, :-1] + 1)
    run = starts.cumsum(dim=1) - 1
    if values.shape[1] == 0:  # there is no run to index
        empty = torch.zeros((*query_values.shape, 1), dtype=torch.int32, device=values.device)
        return empty, empty
    last = values.shape[1] - 1
    first_run = run.gather(1, low.clamp(max=last))
    last_run = run.gather(1, (high - 1).clamp(min=0))
    count = torch.where(found, last_run - first_run + 1, 0)
    num_intervals = max(1, int(count.max())) if count.numel() else 1
    run_start = torch.zeros_like(order).scatter_reduce_(1, run, order, "amin", include_self=False)
    run_stop = torch.zeros_like(order).scatter_reduce_(1, run, order + 1, "amax", include_self=False)
    offsets = torch.arange(num_intervals, device=values.device)
    runs = (first_run[..., None] + offsets).clamp(max=last).flatten(1)
    used = offsets < count[..., None]
    shape = (*query_values.shape, num_intervals)
    start = run_start.gather(1, runs).view(shape).masked_fill(~used, 0)
    stop = run_stop.gather(1, runs).view(shape).masked_fill(~used, 0)
    return start.to(torch.int32), stop.to(torch.int32)


def segment_bounds(starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the start and the end (exclusive) of the segment that contains each token: int32 [B, S] each.

    starts: bool [B, S], true at the first token of a segment; the first token of a row always starts one.
    """
    length = starts.shape[1]
    index = torch.arange(length, dtype=torch.int32, device=starts.device).expand(starts.shape)
    first = index.masked_fill(~starts, 0).cummax(dim=1).values
    # The next segment start after each token, by a cumulative minimum from the right; the end of the row if none.
    following = torch.full_like(index, length)
    following[:, :-1] = index[:, 1:].masked_fill(~starts[:, 1:], length)
    end = following.flip(1).cummin(dim=1).values.flip(1)
    return first, end


def document_starts(positions: Tensor) -> Tensor:
    """Return bool [B, S]: true where a position is not the previous position + 1, so that a document starts."""
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return starts


def to_dense(start: Tensor, stop: Tensor, key_length: int) -> Tensor:
    """Return the dense mask bool [B, Q, T] of disjoint intervals int32 [B, Q, K].

    A running sum along the keys counts the intervals that have started and not stopped, 0 or 1.
    """
    start = start.long().clamp(0, key_length)
    stop = torch.maximum(stop.long().clamp(max=key_length), start)
    change = torch.zeros((*start.shape[:2], key_length + 1), dtype=torch.int8, device=start.device)
    one = torch.ones((), dtype=torch.int8, device=start.device).expand(start.shape)
    change.scatter_add_(2, start, one).scatter_add_(2, stop, -one)
    return change[..., :key_length].cumsum(dim=2, dtype=torch.int8).bool()


def from_dense(blocks: Iterable[Tensor], max_intervals: int) -> tuple[Tensor, Tensor]:
    """Return the canonical intervals of a dense mask: start and stop, int32 [B, Q, K].

    blocks: the dense mask in blocks of consecutive queries, bool [B, Q', T] each; at least one block.

    Raises:
        ValueError: if a query needs more than `max_intervals` intervals.
    """
    intervals, counts = [], []
    needed = 1
    for dense in blocks:
        edge = dense.new_zeros((*dense.shape[:2], 1))
        rising = dense & ~torch.cat([edge, dense[..., :-1]], dim=2)
        counts.append(rising.sum(dim=2))
        needed = max(needed, int(counts[-1].max()) if counts[-1].numel() else 1)
        if needed <= max_intervals:  # else count on, so that the error states how many suffice
            falling = dense & ~torch.cat([dense[..., 1:], edge], dim=2)
            intervals.append(_from_edges(rising, falling, counts[-1]))
    if needed > max_intervals:
        count = torch.cat(counts, dim=1)
        row, query = divmod(int(count.flatten().argmax()), count.shape[1])
        raise ValueError(
            f"this mask needs K={needed} intervals (row {row}, query {query}), more than "
            f"max_intervals={max_intervals}; pass max_intervals={needed} to accept {needed} x 8 bytes per query, "
            "or reorder the keys so that the keys visible to a query are contiguous"
        )
    return join_queries(intervals)


def _from_edges(rising: Tensor, falling: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Return the intervals whose first and last keys are marked, bool [B, Q, T] each; count int64 [B, Q]: how many."""
    needed = max(1, int(count.max())) if count.numel() else 1
    first = count.flatten().cumsum(0) - count.flatten()  # number of intervals of all earlier queries
    row, query, first_key = rising.nonzero(as_tuple=True)
    end = falling.nonzero(as_tuple=True)[2] + 1
    target = torch.arange(len(first_key), device=rising.device) - first[row * rising.shape[1] + query]
    start = torch.zeros((*rising.shape[:2], needed), dtype=torch.int32, device=rising.device)
    stop = torch.zeros_like(start)
    start[row, query, target] = first_key.to(torch.int32)
    stop[row, query, target] = end.to(torch.int32)
    return start, stop
