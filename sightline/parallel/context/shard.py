"""ContextShard: one rank's part of a mask of packed rows, tensors only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.utils import _pytree as pytree

from sightline.masks import AttentionMask


@dataclass(frozen=True, eq=False)
class ContextShard:
    """What the tokens that a rank owns may see, and what it sends and receives for that; see `ContextPlan.shard`.

    mask        AttentionMask [B, S / degree, T] of the rank's own queries over the keys it receives, which lie in the
                order of the row. T is what the neediest row needs, rounded up; no query sees the keys past those
    send        int64 [B, degree, M]: which of the rank's own tokens go to each peer, ascending, -1 beyond. The entry of
                the rank itself are its own keys that its own queries need
    receive     int64 [B, degree, N]: the index, of the T, of each key that comes from each peer, in the order it is
                sent, -1 beyond
    full_mask  of all tokens of the rows, for models with layers that walk along whole rows
    owned_tokens       int64 [B, degree, S / degree], for those too: the tokens of each row that each rank owns

    Everything has B first and lies on the CPU: a pipeline splits a shard with its rows, and `ContextExchange.bind`
    copies to the device what is needed there.
    """

    mask: AttentionMask
    send: Tensor
    receive: Tensor
    full_mask: AttentionMask | None = None
    owned_tokens: Tensor | None = None


pytree.register_dataclass(ContextShard, serialized_type_name="sightline.parallel.context.ContextShard")
