"""Multi-head latent attention: keys and values of all heads are expanded from one small vector a token."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.attention import Lowered, attend
from sightline.layers.cache import KeyValueCache
from sightline.layers.facts import AttentionLayer
from sightline.layers.norm import RMSNorm
from sightline.layers.rope import Rotation, rotate

LATENT_NORM_EPS = 1e-6  # whatever the eps of the model's other norms, in all published weights


class MultiHeadLatentAttention(AttentionLayer):
    """The attention of DeepSeek V2 and V3 (arXiv 2405.04434, section 2.1).

    A token's keys and values come from its latent [kv_rank], and one more key of `rope_size` channels that all heads
    share carries its position. These two are all that generation has to remember. A head's query and key have
    `plain_size` channels without a position and then `rope_size` with one; its value has `value_size`.

    query_rank    queries come through a latent of this size too; None: straight from the hidden state
    score_factor  the scale of the scores is (plain_size + rope_size)^-0.5 times this (YaRN)
    """

    SHARDED: ClassVar = {"query": 0, "kv": 0, "output": 1}

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        query_rank: int | None,
        kv_rank: int,
        plain_size: int,
        rope_size: int,
        value_size: int,
        score_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.kv_rank, self.plain_size, self.rope_size, self.value_size = kv_rank, plain_size, rope_size, value_size
        self.scale = score_factor * (plain_size + rope_size) ** -0.5
        self.query_down = None if query_rank is None else nn.Linear(width, query_rank, bias=False)
        self.query_norm = None if query_rank is None else RMSNorm(query_rank, LATENT_NORM_EPS)
        self.query = nn.Linear(query_rank or width, heads * (plain_size + rope_size), bias=False)
        self.kv_down = nn.Linear(width, kv_rank + rope_size, bias=False)
        self.kv_norm = RMSNorm(kv_rank, LATENT_NORM_EPS)
        self.kv = nn.Linear(kv_rank, heads * (plain_size + value_size), bias=False)
        self.output = nn.Linear(heads * value_size, width, bias=False)

    def init_weights(self, std: float, output_std: float) -> None:
        """Normal: what reads the hidden state by `std`, what reads a normed latent so that it keeps its size."""
        for linear in (self.query, self.query_down, self.kv_down, self.kv):
            if linear is not None:
                reads_latent = linear is self.kv or (linear is self.query and self.query_down is not None)
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5 if reads_latent else std)
        for norm in (self.query_norm, self.kv_norm):
            if norm is not None:
                norm.init_weights()
        nn.init.normal_(self.output.weight, std=output_std)

    def attention_needs(self) -> dict[str, Any]:
        return {"sinks": False, "head_dim": max(self.plain_size + self.rope_size, self.value_size)}

    def parts(self) -> dict[str, int]:
        return {"heads": self.head_groups()}

    def head_groups(self) -> int:
        return self.query.out_features // (self.plain_size + self.rope_size)

    def flops_per_pair(self) -> float:
        """Zeros that fill up a head for the kernel's sake are not counted."""
        return 6.0 * self.head_groups() * (self.plain_size + self.rope_size + self.value_size)

    def forward(self, x: Tensor, mask: Lowered, rotation: Rotation, cache: KeyValueCache | None = None) -> Tensor:
        """x [B, S, W] -> [B, S, W]. With a cache the mask's queries are these S tokens, its keys all tokens so far."""
        latent, turned = self.kv_down(x).split([self.kv_rank, self.rope_size], dim=-1)
        latent, turned = self.kv_norm(latent)[:, :, None], rotate(turned[:, :, None], rotation)  # of one head
        latent, turned = latent.transpose(1, 2), turned.transpose(1, 2)
        if cache is not None:
            latent, turned = cache.append(latent, turned)
        pending = mask.exchange.start(latent, turned)  # those of other processes arrive while the queries are made
        q_BSHD = self._queries(x, rotation)
        latent, turned = (t.transpose(1, 2) for t in pending.wait())
        k_BTHD, v_BTHD = self._keys_and_values(latent[:, :, 0], turned)
        # Kernels want one head size for all: what has less is filled up with zeros, which add nothing to a product.
        size = max(self.plain_size + self.rope_size, self.value_size)
        q, k, v = (F.pad(t, (0, size - t.shape[-1])).transpose(1, 2) for t in (q_BSHD, k_BTHD, v_BTHD))
        out = attend(q, k, v, mask, scale=self.scale)[..., : self.value_size]
        return self.output(out.transpose(1, 2).flatten(2))

    def _queries(self, x: Tensor, rotation: Rotation) -> Tensor:
        """[B, S, H, D], D = plain_size + rope_size."""
        if self.query_down is not None and self.query_norm is not None:
            x = self.query_norm(self.query_down(x))
        q = self.query(x).unflatten(-1, (-1, self.plain_size + self.rope_size))
        plain, turned = q.split([self.plain_size, self.rope_size], dim=-1)
        return torch.cat([plain, rotate(turned, rotation)], dim=-1)

    def _keys_and_values(self, latent: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """latent [B, T, kv_rank], turned [B, T, 1, rope_size] -> keys [B, T, H, D] and values [B, T, H, value_size]."""
        kv = self.kv(latent).unflatten(-1, (-1, self.plain_size + self.value_size))
        plain, v = kv.split([self.plain_size, self.value_size], dim=-1)
        return torch.cat([plain, turned.expand(-1, -1, plain.shape[2], -1)], dim=-1), v
