"""Checks of what users pass to an AttentionMask: shapes, sizes, indices, and the values of intervals."""

from __future__ import annotations

import reprlib
from typing import Any

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1


def check_bounds(start: Tensor, stop: Tensor) -> None:
    """Check that start and stop are tensors [B, Q, K] of one shape on one device."""
    for name, value in (("start", start), ("stop", stop)):
        if not isinstance(value, Tensor) or value.dim() != 3:
            raise ValueError(f"{name} must be integers [B, Q, K], such as int32, got {describe(value)}")
    if start.shape != stop.shape:
        raise ValueError(f"start {tuple(start.shape)} and stop {tuple(stop.shape)} differ in shape")
    if start.device != stop.device:
        raise ValueError(f"start is on {str(start.device)!r} and stop on {str(stop.device)!r}; move one with .to()")


def check_size(name: str, size: Any) -> None:
    """Check a number of rows, queries or keys, which int32 intervals must be able to index."""
    if isinstance(size, bool) or not isinstance(size, int | torch.SymInt) or not 0 <= size <= INT32_MAX:
        raise ValueError(f"{name} must be an int from 0 to {INT32_MAX}, got {size!r}")


def check_index(name: str, index: Any, size: int, device: torch.device, *, allow_negative: bool) -> Tensor:
    """Return the index of rows or queries as int64 on the device; values are checked if they are on a CPU."""
    if not isinstance(index, Tensor) or index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise ValueError(
            f"the index of a {name} must be integers, got {describe(index)}; convert a bool tensor by "
            ".nonzero().flatten()"
        )
    index = index.long()
    if index.device.type == "cpu" and index.numel():
        low, high = (int(value) for value in index.aminmax())
        if low < (-size if allow_negative else 0) or high >= size:
            wrong = high if high >= size else low
            raise IndexError(f"{name} {wrong} is out of range for a mask that has {size}")
    return index.to(device)


def describe(value: Any) -> str:
    """Return the dtype and shape of a tensor, or the type and value of anything else, for an error."""
    return (
        f"{value.dtype} {tuple(value.shape)}"
        if isinstance(value, Tensor)
        else f"{type(value).__name__} {reprlib.repr(value)}"
    )


def check_canonical(start: Tensor, stop: Tensor, key_length: int) -> None:
    """Check that intervals int32 [B, Q, K] are in range, sorted, disjoint and not adjacent, with unused ones last.

    Raises:
        ValueError: if an interval is not; the message names its row and query.
    """
    used = stop > start
    wrong = torch.where(used, (start < 0) | (stop > key_length), (start != 0) | (stop != 0))
    if start.shape[2] > 1:
        wrong[..., 1:] |= used[..., 1:] & (~used[..., :-1] | (start[..., 1:] <= stop[..., :-1]))
    if not bool(wrong.any()):
        return
    index = torch.nonzero(wrong)[0]
    row, query, number = index.tolist()
    low, high = int(start[row, query, number]), int(stop[row, query, number])
    if low > high:
        reason = "starts after its end"
    elif low == high:
        reason = "is empty, but an unused interval must be [0, 0)"
    elif low < 0 or high > key_length:
        reason = f"extends outside the keys [0, {key_length})"
    elif not bool(used[row, query, number - 1]):
        reason = "follows an empty interval, but unused intervals must come last"
    else:
        before = f"[{int(start[row, query, number - 1])}, {int(stop[row, query, number - 1])})"
        reason = f"overlaps, touches or precedes the interval before it, {before}"
    raise ValueError(
        f"interval {number} of row {row}, query {query} is [{low}, {high}), which {reason}; build the mask with "
        "AttentionMask.from_intervals, which clips, sorts and merges intervals"
    )
