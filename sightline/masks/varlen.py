"""AttentionMask -> the cu_seqlens of varlen kernels, for the masks they can say."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sightline.masks.intervals import segment_bounds


@dataclass(frozen=True)
class VarlenLayout:
    """The rows of a batch laid end to end, cut into sequences that attend only themselves.

    cu_seqlens  int32 [N + 1], where each sequence begins in the B * S tokens, and their end
    max_length  tokens of the longest sequence
    window      keys seen (to the left, to the right) of a query, itself not counted, as `varlen_attn` takes it:
                (-1, 0) is causal, (W - 1, 0) a causal window of W keys, (-1, -1) both directions
    padding     bool [B, S] of tokens that see nothing: they lie in sequences of their own, and a kernel's output for
                them must be set to zero; None where there are none
    """

    cu_seqlens: Tensor
    max_length: int
    window: tuple[int, int]
    padding: Tensor | None


def build_varlen(start: Tensor, stop: Tensor, key_length: int) -> VarlenLayout:
    """See AttentionMask.to_varlen. start, stop: canonical int32 [B, Q, K].

    Guess the only layout that could be right from where sequences would begin, then compare it with the mask.
    """
    rows, queries, width = start.shape
    if queries != key_length:
        raise ValueError(f"varlen needs queries and keys to be the same tokens, got Q={queries} and T={key_length}")
    if width > 1:
        row, query = divmod(int((stop > start).sum(dim=2).flatten().argmax()), queries)
        raise ValueError(f"varlen sees one run of keys a query, but row {row}, query {query} sees {width}")
    start, stop = start[..., 0], stop[..., 0]
    index = torch.arange(queries, dtype=torch.int32, device=start.device).expand(rows, queries)
    padding = stop <= start
    begins = start == index
    begins |= padding  # each padding token is a sequence of its own
    begins[:, 1:] |= padding[:, :-1] & ~padding[:, 1:]
    begins[:, 0] = True
    first, end = segment_bounds(begins)
    if bool(((stop == index + 1) | padding).all()):
        reach = index - start + 1
        window = int(torch.where(padding, 1, reach).max())
        # A window as long as the longest sequence hides nothing.
        guess = (torch.maximum(first, index - window + 1), index + 1)
        sides = (-1, 0) if window >= int((end - first).max()) else (window - 1, 0)
    else:
        guess, sides = (first, end), (-1, -1)
    wrong = ((guess[0] != start) | (guess[1] != stop)) & ~padding
    if bool(wrong.any()):
        row, query = divmod(int(wrong.flatten().int().argmax()), queries)
        raise ValueError(
            "varlen can say documents that are causal, causal with one window, or seen in both directions; "
            f"row {row}, query {query} sees [{int(start[row, query])}, {int(stop[row, query])}), which is none of "
            "these"
        )
    starts = begins.flatten().nonzero().flatten().to(torch.int32)
    cu_seqlens = torch.cat([starts, starts.new_tensor([rows * queries])])
    return VarlenLayout(
        cu_seqlens=cu_seqlens,
        max_length=int(cu_seqlens.diff().max()),
        window=sides,
        padding=padding if bool(padding.any()) else None,
    )
