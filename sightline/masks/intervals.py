"""Interval arithmetic on tensors: the few vector operations every rule, operator and lowering is made of.

Everything here is O(S K) up to a sort of the K intervals of one query, or of the S tokens of one row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def canonical(start: Tensor, stop: Tensor, key_length: int) -> tuple[Tensor, Tensor]:
    """Sorted, merged and without empty intervals; K as small as the neediest query allows.

    start, stop: int32 [B, Q, K], in any order, overlapping, touching, empty or reaching past the keys.
    Returns int32 [B, Q, K'] with 1 <= K' <= K.

        [4, 6) [0, 2) [2, 3) [5, 5)   ->   [0, 3) [4, 6)
    """
    start, stop = start.clamp(min=0), stop.clamp(max=key_length)
    empty = stop <= start
    if start.shape[2] == 1:
        return start.masked_fill(empty, 0), stop.masked_fill(empty, 0)
    # An empty interval sorts last as [T, T): it either joins an interval that reaches T or is dropped.
    start, order = start.masked_fill(empty, key_length).sort(dim=2)
    stop = stop.masked_fill(empty, key_length).gather(2, order)
    reach = stop.cummax(dim=2).values
    real = start < key_length
    new = real.clone()
    new[..., 1:] &= start[..., 1:] > reach[..., :-1]
    slot = new.cumsum(dim=2) - 1
    needed = max(1, int(slot[..., -1].max()) + 1) if slot.numel() else 1
    slot = slot.masked_fill(~real, needed)  # the extra column at the end takes what is dropped
    shape = (*start.shape[:2], needed + 1)
    merged_start = start.new_full(shape, key_length).scatter_reduce_(2, slot, start, "amin")[..., :needed]
    merged_stop = stop.new_zeros(shape).scatter_reduce_(2, slot, reach, "amax")[..., :needed]
    return merged_start.masked_fill(merged_start >= merged_stop, 0), merged_stop


def find_runs(values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The runs of equal keys each query asks for: where `values` is what the query wants.

    values  int [B, T], what each key is (a document, a span, an image)
    wanted  int [B, Q], which of them the query sees; below 0 is none
    Returns start, stop: int32 [B, Q, K], K = the most runs one value has in a row (1 for packed documents).

        values 7 7 5 5 7    wanted 5   ->   [2, 4)        wanted 7   ->   [0, 2) [4, 5)
    """
    values, order = values.sort(dim=1, stable=True)  # equal values stand together, their places in order
    wanted = wanted.to(values.dtype).contiguous()
    low = torch.searchsorted(values, wanted)
    high = torch.searchsorted(values, wanted, right=True)
    found = (wanted >= 0) & (high > low)
    # A run begins where the value changes or the place jumps; run number r begins at sorted place head[r].
    begins = torch.ones_like(values, dtype=torch.bool)
    begins[:, 1:] = (values[:, 1:] != values[:, :-1]) | (order[:, 1:] != order[:, :-1] + 1)
    run = begins.cumsum(dim=1) - 1
    last = values.shape[1] - 1
    first_run = run.gather(1, low.clamp(max=last))
    last_run = run.gather(1, (high - 1).clamp(min=0))
    count = torch.where(found, last_run - first_run + 1, 0)
    width = max(1, int(count.max())) if count.numel() else 1
    run_start = torch.zeros_like(order).scatter_reduce_(1, run, order, "amin", include_self=False)
    run_stop = torch.zeros_like(order).scatter_reduce_(1, run, order + 1, "amax", include_self=False)
    slots = torch.arange(width, device=values.device)
    asked = (first_run[..., None] + slots).clamp(max=last).flatten(1)
    taken = slots < count[..., None]
    shape = (*wanted.shape, width)
    start = run_start.gather(1, asked).view(shape).masked_fill(~taken, 0)
    stop = run_stop.gather(1, asked).view(shape).masked_fill(~taken, 0)
    return start.to(torch.int32), stop.to(torch.int32)


def segment_bounds(begins: Tensor) -> tuple[Tensor, Tensor]:
    """First index and end of the segment each token lies in: int32 [B, S] each.

    begins: bool [B, S], true where a segment begins; the first token always begins one.
    """
    length = begins.shape[1]
    index = torch.arange(length, dtype=torch.int32, device=begins.device).expand(begins.shape)
    first = index.masked_fill(~begins, 0).cummax(dim=1).values
    # The next beginning after a token, read from the right; the row's end where there is none.
    following = torch.full_like(index, length)
    following[:, :-1] = index[:, 1:].masked_fill(~begins[:, 1:], length)
    end = following.flip(1).cummin(dim=1).values.flip(1)
    return first, end


def document_starts(positions: Tensor) -> Tensor:
    """bool [B, S]: true where a token does not continue the one before it, so a document begins."""
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return begins


def from_dense(dense: Tensor, max_intervals: int) -> tuple[Tensor, Tensor]:
    """Canonical intervals of bool [B, Q, T]: int32 [B, Q, K] each. Refuses more than `max_intervals` of a query."""
    edge = dense.new_zeros((*dense.shape[:2], 1))
    opens = dense & ~torch.cat([edge, dense[..., :-1]], dim=2)
    closes = dense & ~torch.cat([dense[..., 1:], edge], dim=2)
    count = opens.sum(dim=2)
    needed = max(1, int(count.max())) if count.numel() else 1
    if needed > max_intervals:
        at_row, at_query = divmod(int(count.flatten().argmax()), dense.shape[1])
        raise ValueError(
            f"this mask needs K={needed} intervals (row {at_row}, query {at_query}), more than "
            f"max_intervals={max_intervals}; pass max_intervals={needed} to accept {needed} x 8 bytes a query, "
            "or give the keys an order in which what a query sees lies together"
        )
    first = count.flatten().cumsum(0) - count.flatten()  # intervals before each query's own
    row, query, begin = opens.nonzero(as_tuple=True)
    end = closes.nonzero(as_tuple=True)[2] + 1
    slot = torch.arange(len(begin), device=dense.device) - first[row * dense.shape[1] + query]
    start = torch.zeros((*dense.shape[:2], needed), dtype=torch.int32, device=dense.device)
    stop = torch.zeros_like(start)
    start[row, query, slot] = begin.to(torch.int32)
    stop[row, query, slot] = end.to(torch.int32)
    return start, stop
