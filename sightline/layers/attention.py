"""Grouped-query attention: projections, RoPE and `attend`."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sightline.attention import Lowered, attend
from sightline.layers.base import AttentionLayer
from sightline.layers.cache import KeyValueCache
from sightline.layers.linear import Linear
from sightline.layers.norm import RMSNorm
from sightline.layers.rope import rotate


class GroupedQueryAttention(AttentionLayer):
    """H query heads share G key/value heads (arXiv 2305.13245): query head h uses key/value head h // (H / G).

    bias         add a bias to all four projections
    qk_norm_eps  if set, apply RMSNorm to each query and key head before RoPE (arXiv 2302.05442), with one weight [D]
                 shared by all query heads and one shared by all key heads
    sinks        give each query head a learned logit that takes part in its softmax but has no value, so that a query
                 can attend to no key at all (arXiv 2309.17453)

    Subclasses with another position encoding override `encode_keys`, and `encode_queries` if queries differ from keys.
    """

    MATRICES: ClassVar = ()  # `sinks` is the only parameter outside the projections and norms
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
        self.query = Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.key = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.value = Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.output = Linear(num_heads * head_dim, hidden_size, bias=bias)
        self.query_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)
        self.key_norm = None if qk_norm_eps is None else RMSNorm(head_dim, qk_norm_eps)
        self.sinks = nn.Parameter(torch.empty(num_heads)) if sinks else None

    def init_weights(self, std: float, output_std: float) -> None:
        """Initialize weights to normal with these standard deviations, norms to 1, biases and sinks to 0."""
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
        return {"sinks": self.sinks is not None, "head_dim": self.head_dim, "value_dim": self.head_dim}

    def tensor_parallel_units(self) -> dict[str, int]:
        return {"key/value heads": self.num_kv_heads()}

    def num_kv_heads(self) -> int:
        return self.key.out_features // self.head_dim

    def flops_per_pair(self) -> float:
        """12 FLOPs per channel of each query head."""
        return 12.0 * self.query.out_features

    def forward(self, x: Tensor, mask: Lowered, encoding: Any, cache: KeyValueCache | None = None) -> Tensor:
        """x [B, S, W] -> [B, S, W]. `encoding` goes to `encode_keys`: a Rotation, or None for no RoPE.

        With a cache, the queries of the mask are these S tokens and its keys are all tokens so far.
        """
        return self.output(self.attend_heads(x, mask, encoding, cache))

    def attend_heads(self, x: Tensor, mask: Lowered, encoding: Any, cache: KeyValueCache | None = None) -> Tensor:
        """Return the concatenated head outputs [B, S, H * D]: `forward` without the output projection."""
        k_BSGD, v_BSGD = self._split_heads(self.key(x)), self._split_heads(self.value(x))
        if self.key_norm is not None:
            k_BSGD = self.key_norm(k_BSGD)
        # No transpose copies: kernels accept strided views, and attend's output is contiguous as [B, S, H, D].
        k, v = self.encode_keys(k_BSGD, encoding).transpose(1, 2), v_BSGD.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)
        pending = mask.exchange.start(k, v)  # overlaps with the computation of the queries
        q_BSHD = self._split_heads(self.query(x))
        if self.query_norm is not None:
            q_BSHD = self.query_norm(q_BSHD)
        q = self.encode_queries(q_BSHD, encoding).transpose(1, 2)
        k, v = pending.wait()
        return attend(q, k, v, mask, sinks=self.sinks).transpose(1, 2).flatten(2)

    def encode_keys(self, k_BSGD: Tensor, encoding: Any) -> Tensor:
        """Apply RoPE to the keys, or return them unchanged if `encoding` is None."""
        return k_BSGD if encoding is None else rotate(k_BSGD, encoding)

    def encode_queries(self, q_BSHD: Tensor, encoding: Any) -> Tensor:
        """Apply the position encoding to the queries; by default the same as for keys."""
        return self.encode_keys(q_BSHD, encoding)

    def _split_heads(self, x: Tensor) -> Tensor:
        """[B, S, heads * D] -> [B, S, heads, D], where `heads` is the number of heads on this rank."""
        return x.unflatten(-1, (-1, self.head_dim))
