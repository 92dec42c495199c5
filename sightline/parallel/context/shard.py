"""ContextShard: one rank's part of an attention mask and its send and receive indices, tensors only."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.utils import _pytree as pytree

from sightline.masks import AttentionMask


@dataclass(frozen=True, eq=False)
class ContextShard:
    """The local mask of a rank, and which keys it sends and receives; see `ContextPlan.shard`.

    mask          AttentionMask [B, S / degree, T] of the local queries over the keys that the rank receives, in the
                  order of the row. T is the most keys that a row needs, rounded up; no query attends to the rest
    send          int64 [B, degree, M]: the local tokens whose keys go to each rank, ascending, padded with -1. For the
                  rank itself, the local keys that its local queries attend to
    receive       int64 [B, degree, N]: the index in T of each key from each rank, in the order sent, padded with -1
    full_mask     the mask of all tokens of the rows, for models with recurrent layers
    owned_tokens  int64 [B, degree, S / degree], for the same models: the tokens of each row that each rank owns

    All tensors have B first and are on the CPU: a pipeline splits a shard along its rows, and `ContextExchange.bind`
    copies what it needs to the device.
    """

    mask: AttentionMask
    send: Tensor
    receive: Tensor
    full_mask: AttentionMask | None = None
    owned_tokens: Tensor | None = None


pytree.register_dataclass(ContextShard, serialized_type_name="sightline.parallel.context.ContextShard")
