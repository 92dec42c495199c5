"""Convert an AttentionMask to cu_seqlens and a window for varlen kernels, if they can express it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sightline.masks.intervals import segment_bounds


@dataclass(frozen=True)
class VarlenLayout:
    """The rows of a batch, concatenated and split into N sequences that attend only to themselves.

    cu_seqlens  int32 [N + 1], offset of each sequence in the B * S tokens, then B * S
    max_length  tokens of the longest sequence
    window      number of visible keys (left, right) of the query, as `window_size` of `varlen_attn`:
                (-1, 0) is causal, (W - 1, 0) a causal window of W keys, (-1, -1) bidirectional
    padding     bool [B, S], true for fully masked tokens: each is a sequence of one token whose output must be set to
                zero after the kernel; None if there are none
    """

    cu_seqlens: Tensor
    max_length: int
    window: tuple[int, int]
    padding: Tensor | None


def build_varlen(start: Tensor, stop: Tensor, key_length: int) -> VarlenLayout:
    """Implementation of `AttentionMask.to_varlen`. start, stop: canonical int32 [B, Q, K].

    The sequence starts leave only one possible layout; build its intervals and compare them with the mask.
    """
    rows, queries, num_intervals = start.shape
    if queries != key_length:
        raise ValueError(f"varlen needs queries and keys to be the same tokens, got Q={queries} and T={key_length}")
    if num_intervals > 1:
        row, query = divmod(int((stop > start).sum(dim=2).flatten().argmax()), queries)
        raise ValueError(
            f"varlen needs one interval of keys per query, but row {row}, query {query} attends to "
            f"{num_intervals} intervals"
        )
    start, stop = start[..., 0], stop[..., 0]
    if start.numel() == 0:
        return VarlenLayout(start.new_zeros(1), max_length=0, window=(-1, 0), padding=None)
    index = torch.arange(queries, dtype=torch.int32, device=start.device).expand(rows, queries)
    padding = stop <= start
    is_start = start == index
    is_start |= padding  # each padding token is a separate sequence
    is_start[:, 1:] |= padding[:, :-1] & ~padding[:, 1:]
    is_start[:, 0] = True
    first, end = segment_bounds(is_start)
    if bool(((stop == index + 1) | padding).all()):
        visible_keys = index - start + 1
        window = int(torch.where(padding, 1, visible_keys).max())
        # A window at least as long as the longest sequence is plain causal attention.
        expected = (torch.maximum(first, index - window + 1), index + 1)
        window_size = (-1, 0) if window >= int((end - first).max()) else (window - 1, 0)
    else:
        expected, window_size = (first, end), (-1, -1)
    differs = ((expected[0] != start) | (expected[1] != stop)) & ~padding
    if bool(differs.any()):
        row, query = divmod(int(differs.flatten().int().argmax()), queries)
        raise ValueError(
            "varlen supports documents that are causal, causal with one sliding window, or bidirectional; "
            f"row {row}, query {query} attends to [{int(start[row, query])}, {int(stop[row, query])}), which is none "
            "of these"
        )
    starts = is_start.flatten().nonzero().flatten().to(torch.int32)
    cu_seqlens = torch.cat([starts, starts.new_tensor([rows * queries])])
    return VarlenLayout(
        cu_seqlens=cu_seqlens,
        max_length=int(cu_seqlens.diff().max()),
        window=window_size,
        padding=padding if bool(padding.any()) else None,
    )
