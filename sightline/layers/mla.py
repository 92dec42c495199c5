"""Multi-head latent attention (MLA): keys and values of all heads are projected from one small latent per token."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sightline.attention import Lowered, OneQuery, attend
from sightline.layers.base import AttentionLayer
from sightline.layers.cache import KeyValueCache
from sightline.layers.linear import Linear
from sightline.layers.norm import RMSNorm
from sightline.layers.rope import Rotation, rotate

LATENT_NORM_EPS = 1e-6  # in all published models, independent of the eps of their other norms


class MultiHeadLatentAttention(AttentionLayer):
    """The attention of DeepSeek V2 and V3 (arXiv 2405.04434, section 2.1).

    Keys and values of a token are projected from its latent [kv_lora_rank]. All heads share one more key, with RoPE, of
    `qk_rope_head_dim` channels. The cache stores only the latent and this key. Each head's query and key have
    `qk_nope_head_dim` channels without RoPE, then `qk_rope_head_dim` with RoPE; its value has `v_head_dim` channels.

    q_lora_rank   size of the latent of the queries; None projects queries directly from the hidden state
    score_factor  factor of the scale of the scores, (qk_nope_head_dim + qk_rope_head_dim)^-0.5 (for YaRN)
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
        self.kv_lora_rank, self.v_head_dim = kv_lora_rank, v_head_dim
        self.qk_nope_head_dim, self.qk_rope_head_dim = qk_nope_head_dim, qk_rope_head_dim
        self.scale = score_factor * (qk_nope_head_dim + qk_rope_head_dim) ** -0.5
        self.query_down = None if q_lora_rank is None else Linear(hidden_size, q_lora_rank, bias=False)
        self.query_norm = None if q_lora_rank is None else RMSNorm(q_lora_rank, LATENT_NORM_EPS)
        query_channels = num_heads * (qk_nope_head_dim + qk_rope_head_dim)
        self.query = Linear(q_lora_rank or hidden_size, query_channels, bias=False)
        self.kv_down = Linear(hidden_size, kv_lora_rank + qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(kv_lora_rank, LATENT_NORM_EPS)
        self.kv = Linear(kv_lora_rank, num_heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.output = Linear(num_heads * v_head_dim, hidden_size, bias=False)

    def init_weights(self, std: float, output_std: float) -> None:
        """Initialize weights to normal with these standard deviations; weights that read a latent use fan_in^-0.5."""
        for linear in (self.query, self.query_down, self.kv_down, self.kv):
            if linear is not None:
                reads_latent = linear is self.kv or (linear is self.query and self.query_down is not None)
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5 if reads_latent else std)
        for norm in (self.query_norm, self.kv_norm):
            if norm is not None:
                norm.init_weights()
        nn.init.normal_(self.output.weight, std=output_std)

    def kernel_requirements(self) -> dict[str, Any]:
        head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        return {"sinks": False, "head_dim": head_dim, "value_dim": self.v_head_dim}

    def tensor_parallel_units(self) -> dict[str, int]:
        return {"heads": self.num_kv_heads()}

    def num_kv_heads(self) -> int:
        return self.query.out_features // (self.qk_nope_head_dim + self.qk_rope_head_dim)

    def flops_per_pair(self) -> float:
        """Return the FLOPs of `AttentionLayer.flops_per_pair`, for keys and values of different sizes."""
        return 6.0 * self.num_kv_heads() * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim)

    def forward(self, x: Tensor, mask: Lowered, rotation: Rotation, cache: KeyValueCache | None = None) -> Tensor:
        """x [B, S, W] -> [B, S, W].

        With a cache, the queries of the mask are these S tokens and its keys are all tokens so far.
        """
        latent, k_rope = self.kv_down(x).split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        latent, k_rope = self.kv_norm(latent)[:, :, None], rotate(k_rope[:, :, None], rotation)  # one head
        latent, k_rope = latent.transpose(1, 2), k_rope.transpose(1, 2)
        if cache is not None:
            (joint,) = cache.append(torch.cat([latent, k_rope], dim=-1))
            if isinstance(mask.backend, OneQuery):
                return self._attend_to_latents(x, mask, rotation, joint)
            latent, k_rope = joint.split([self.kv_lora_rank, self.qk_rope_head_dim], dim=-1)
        pending = mask.exchange.start(latent, k_rope)  # overlaps with the computation of the queries
        q_BSHD = self._queries(x, rotation)
        latent, k_rope = (t.transpose(1, 2) for t in pending.wait())
        k_BTHD, v_BTHD = self._keys_and_values(latent[:, :, 0], k_rope)
        q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BTHD, v_BTHD))
        out = attend(q, k, v, mask, scale=self.scale)
        return self.output(out.transpose(1, 2).flatten(2))

    def _attend_to_latents(self, x: Tensor, mask: Lowered, rotation: Rotation, joint: Tensor) -> Tensor:
        """Compute `forward` of one token per row without the keys and values of the cached tokens.

        A score q_nope' W k of a latent k is (W' q_nope)' k, so the query moves to the space of the latents; the sum of
        the weighted latents is projected to the value. The cached tokens are read once for all heads.

        x      [B, 1, W]
        joint  [B, 1, T, kv_lora_rank + qk_rope_head_dim], the latents and the shared keys of all tokens so far
        """
        weight = self.kv.weight.unflatten(0, (-1, self.qk_nope_head_dim + self.v_head_dim))  # [H, channels, rank]
        key_weight, value_weight = weight.split([self.qk_nope_head_dim, self.v_head_dim], dim=1)
        q_nope, q_rope = self._split_queries(x, rotation)
        q_latent = torch.bmm(q_nope[:, 0].transpose(0, 1), key_weight).transpose(0, 1)  # [B, H, rank]
        q = torch.cat([q_latent, q_rope[:, 0]], dim=-1)[:, :, None]
        out = attend(q, joint, joint[..., : self.kv_lora_rank], mask, scale=self.scale)
        values = torch.bmm(out[:, :, 0].transpose(0, 1), value_weight.mT).transpose(0, 1)  # [B, H, v_head_dim]
        return self.output(values.flatten(1)[:, None])

    def _queries(self, x: Tensor, rotation: Rotation) -> Tensor:
        """Return the queries [B, S, H, D] after RoPE, D = qk_nope_head_dim + qk_rope_head_dim."""
        return torch.cat(self._split_queries(x, rotation), dim=-1)

    def _split_queries(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """Return the queries without RoPE [B, S, H, qk_nope_head_dim] and with RoPE [B, S, H, qk_rope_head_dim]."""
        if self.query_down is not None and self.query_norm is not None:
            x = self.query_norm(self.query_down(x))
        q = self.query(x).unflatten(-1, (-1, self.qk_nope_head_dim + self.qk_rope_head_dim))
        q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        return q_nope, rotate(q_rope, rotation)

    def _keys_and_values(self, latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys [B, T, H, D] and values [B, T, H, v_head_dim].

        latent  [B, T, kv_lora_rank]
        k_rope  [B, T, 1, qk_rope_head_dim], the key that all heads share, after RoPE
        """
        kv = self.kv(latent).unflatten(-1, (-1, self.qk_nope_head_dim + self.v_head_dim))
        k_nope, v = kv.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        return torch.cat([k_nope, k_rope.expand(-1, -1, k_nope.shape[2], -1)], dim=-1), v
