"""Multi-head latent attention: keys and values of all heads are expanded from one small vector a token."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.attention import Lowered, attend
from sightline.layers.base import AttentionLayer
from sightline.layers.cache import KeyValueCache
from sightline.layers.norm import RMSNorm
from sightline.layers.rope import Rotation, rotate

LATENT_NORM_EPS = 1e-6  # whatever the eps of the model's other norms, in all published weights


class MultiHeadLatentAttention(AttentionLayer):
    """The attention of DeepSeek V2 and V3 (arXiv 2405.04434, section 2.1).

    A token's keys and values come from its latent [kv_lora_rank], and one more key of `qk_rope_head_dim` channels that all heads
    share carries its position. These two are all that generation has to remember. A head's query and key have
    `qk_nope_head_dim` channels without a position and then `qk_rope_head_dim` with one; its value has `v_head_dim`.

    q_lora_rank    queries come through a latent of this size too; None: straight from the hidden state
    score_factor  the scale of the scores is (qk_nope_head_dim + qk_rope_head_dim)^-0.5 times this (YaRN)
    """

    SHARD_DIMS: ClassVar = {"query": 0, "kv": 0, "output": 1}

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        score_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim = (
            kv_lora_rank,
            qk_nope_head_dim,
            qk_rope_head_dim,
            v_head_dim,
        )
        self.scale = score_factor * (qk_nope_head_dim + qk_rope_head_dim) ** -0.5
        self.query_down = None if q_lora_rank is None else nn.Linear(hidden_size, q_lora_rank, bias=False)
        self.query_norm = None if q_lora_rank is None else RMSNorm(q_lora_rank, LATENT_NORM_EPS)
        self.query = nn.Linear(
            q_lora_rank or hidden_size, num_heads * (qk_nope_head_dim + qk_rope_head_dim), bias=False
        )
        self.kv_down = nn.Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(kv_lora_rank, LATENT_NORM_EPS)
        self.kv = nn.Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.output = nn.Linear(num_heads * v_head_dim, hidden_size, bias=False)

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

    def kernel_requirements(self) -> dict[str, Any]:
        return {"sinks": False, "head_dim": max(self.qk_nope_head_dim + self.qk_rope_head_dim, self.v_head_dim)}

    def tensor_parallel_units(self) -> dict[str, int]:
        return {"heads": self.num_kv_heads()}

    def num_kv_heads(self) -> int:
        return self.query.out_features // (self.qk_nope_head_dim + self.qk_rope_head_dim)

    def flops_per_pair(self) -> float:
        """Zeros that fill up a head for the kernel's sake are not counted."""
        return 6.0 * self.num_kv_heads() * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim)

    def forward(self, x: Tensor, mask: Lowered, rotation: Rotation, cache: KeyValueCache | None = None) -> Tensor:
        """x [B, S, W] -> [B, S, W]. With a cache the mask's queries are these S tokens, its keys all tokens so far."""
        latent, turned = self.kv_down(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent, turned = self.kv_norm(latent)[:, :, None], rotate(turned[:, :, None], rotation)  # of one head
        latent, turned = latent.transpose(1, 2), turned.transpose(1, 2)
        if cache is not None:
            latent, turned = cache.append(latent, turned)
        pending = mask.exchange.start(latent, turned)  # those of other processes arrive while the queries are made
        q_BSHD = self._queries(x, rotation)
        latent, turned = (t.transpose(1, 2) for t in pending.wait())
        k_BTHD, v_BTHD = self._keys_and_values(latent[:, :, 0], turned)
        # Kernels want one head size for all: what has less is filled up with zeros, which add nothing to a product.
        size = max(self.qk_nope_head_dim + self.qk_rope_head_dim, self.v_head_dim)
        q, k, v = (F.pad(t, (0, size - t.shape[-1])).transpose(1, 2) for t in (q_BSHD, k_BTHD, v_BTHD))
        out = attend(q, k, v, mask, scale=self.scale)[..., : self.v_head_dim]
        return self.output(out.transpose(1, 2).flatten(2))

    def _queries(self, x: Tensor, rotation: Rotation) -> Tensor:
        """[B, S, H, D], D = qk_nope_head_dim + qk_rope_head_dim."""
        if self.query_down is not None and self.query_norm is not None:
            x = self.query_norm(self.query_down(x))
        q = self.query(x).unflatten(-1, (-1, self.qk_nope_head_dim + self.qk_rope_head_dim))
        plain, turned = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        return torch.cat([plain, rotate(turned, rotation)], dim=-1)

    def _keys_and_values(self, latent: Tensor, turned: Tensor) -> tuple[Tensor, Tensor]:
        """latent [B, T, kv_lora_rank], turned [B, T, 1, qk_rope_head_dim] -> keys [B, T, H, D] and values [B, T, H, v_head_dim]."""
        kv = self.kv(latent).unflatten(-1, (-1, self.qk_nope_head_dim + self.v_head_dim))
        plain, v = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return torch.cat([plain, turned.expand(-1, -1, plain.shape[2], -1)], dim=-1), v
