"""The attention layer: projections, rotation and `attend`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sightline.attention import Lowered, attend
from sightline.layers.base import AttentionLayer
from sightline.layers.cache import KeyValueCache
from sightline.layers.norm import RMSNorm
from sightline.layers.rope import rotate


class GroupedQueryAttention(AttentionLayer):
    """H query heads share G key/value heads (arXiv 2305.13245); query head h reads key/value head h // (H / G).

    bias         the four projections have one
    qk_norm_eps  with it, queries and keys are normed over their head before they are rotated (arXiv 2302.05442), by
                 one weight [D] for all query heads and one for all key heads
    sinks        every query head has a learned logit that takes part in its softmax and carries no value: where no
                 key deserves attention, it takes it (arXiv 2309.17453)

    A family whose positions enter in another way overrides `encode_keys`, and `encode_queries` where they differ.
    """

    MATRICES: ClassVar = ()  # of its own it has only the sinks
    SHARD_DIMS: ClassVar = {"query": 0, "key": 0, "value": 0, "sinks": 0, "output.weight": 1}
    PARTIAL_SUMS = ("output.bias",)

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        qk_norm_eps: float | None = None,
        sinks: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.key = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.value = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.output = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.query_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)
        self.key_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)
        self.sinks = nn.Parameter(torch.empty(num_heads)) if sinks else None

    def init_weights(self, std: float, output_std: float) -> None:
        """Weights normal with these spreads; norms 1; biases and sinks 0."""
        for linear in (self.query, self.key, self.value, self.output):
            nn.init.normal_(linear.weight, std=output_std if linear is self.output else std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        for norm in (self.query_norm, self.key_norm):
            if norm is not None:
                norm.init_weights()
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def kernel_requirements(self) -> dict[str, Any]:
        return {"sinks": self.sinks is not None, "head_dim": self.head_dim}

    def tensor_parallel_units(self) -> dict[str, int]:
        return {"key/value heads": self.num_kv_heads()}

    def num_kv_heads(self) -> int:
        return self.key.out_features // self.head_dim

    def flops_per_pair(self) -> float:
        """12 a channel of every query head."""
        return 12.0 * self.query.out_features

    def forward(self, x: Tensor, mask: Lowered, encoding: Any, cache: KeyValueCache | None = None) -> Tensor:
        """x [B, S, W] -> [B, S, W]; encoding is what `encode_keys` takes, a Rotation or None for no rotation.

        With a cache the mask's queries are these S tokens, its keys all tokens so far.
        """
        return self.output(self.mix(x, mask, encoding, cache))

    def mix(self, x: Tensor, mask: Lowered, encoding: Any, cache: KeyValueCache | None = None) -> Tensor:
        """What the heads gather, [B, S, H * D]: `forward` before the output projection."""
        k_BSGD, v_BSGD = self._heads(self.key(x)), self._heads(self.value(x))
        if self.key_norm is not None:
            k_BSGD = self.key_norm(k_BSGD)
        # The kernels take strided views, and attend's output lies in memory as [B, S, H, D]: nothing here copies.
        k, v = self.encode_keys(k_BSGD, encoding).transpose(1, 2), v_BSGD.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        pending = mask.exchange.start(k, v)  # keys and values of other processes arrive while the queries are made
        q_BSHD = self._heads(self.query(x))
        if self.query_norm is not None:
            q_BSHD = self.query_norm(q_BSHD)
        q = self.encode_queries(q_BSHD, encoding).transpose(1, 2)
        k, v = pending.wait()
        return attend(q, k, v, mask, sinks=self.sinks).transpose(1, 2).flatten(2)

    def encode_keys(self, k_BSGD: Tensor, encoding: Any) -> Tensor:
        """Write the positions into the keys: turn them by a Rotation, or leave them where it is None."""
        return k_BSGD if encoding is None else rotate(k_BSGD, encoding)

    def encode_queries(self, q_BSHD: Tensor, encoding: Any) -> Tensor:
        """Write the positions into the queries: as into the keys."""
        return self.encode_keys(q_BSHD, encoding)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, S, heads * D] -> [B, S, heads, D], for as many heads as this process holds."""
        return x.unflatten(-1, (-1, self.head_dim))
