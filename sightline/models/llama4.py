"""Llama 4 text model (Meta, 2025): chunked attention with RoPE, every n-th layer full without RoPE, and experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from sightline.batch import Batch
from sightline.config.recipes import debug, on_gpus, tiny
from sightline.layers import Experts, GroupedQueryAttention, Llama3RopeScaling, MoE, Rotation, Router, SwiGLU
from sightline.masks import AttentionMask, causal, chunked, document
from sightline.models.block import Block
from sightline.models.checks import check_experts, check_heads, check_positive
from sightline.models.decoder import Decoder, DecoderConfig
from sightline.models.family import Family
from sightline.models.hf.llama4 import LLAMA4_HF


@dataclass(frozen=True, kw_only=True)
class Llama4Config(DecoderConfig):
    """Config of a Llama 4 text model."""

    num_layers: int = 8
    """Number of decoder layers."""
    num_heads: int = 8
    """Number of query heads (H)."""
    num_kv_heads: int = 4
    """Number of key/value heads (G); must divide num-heads."""
    head_dim: int = 32
    """Channels of an attention head (D); must be even."""
    no_rope_layer_interval: int = 4
    """Every n-th layer attends to the full document without RoPE (NoPE); the others use RoPE within their chunk."""
    attention_chunk_size: int = 128
    """Tokens per attention chunk, counted from the start of each document."""
    qk_norm: bool = True
    """Apply RMSNorm without a weight to queries and keys after RoPE, in the chunked layers."""
    temperature_scale: float = 0.1
    """Attention temperature of the full layers: the query at position p is multiplied by 1 + temperature-scale * ln(1 +
    floor((p + 1) / temperature-floor)); 0 disables it."""
    temperature_floor: int = 8192
    """Tokens per step of the attention temperature; see temperature-scale."""
    moe_layer_interval: int = 2
    """Every n-th layer has experts; the others are dense."""
    intermediate_size_mlp: int = 688
    """Intermediate size of the dense feed-forward layers."""
    intermediate_size: int = 344
    """Intermediate size of each expert, and of the shared expert."""
    num_experts: int = 8
    """Number of routed experts per MoE layer (E)."""
    experts_per_token: int = 1
    """Number of routed experts that the router selects for each token (K)."""
    aux_loss_coef: float = 0.001
    """Coefficient of the auxiliary load-balancing loss; 0 disables it."""
    rope_scaling: Llama3RopeScaling | None = None
    """Llama 3.1 scaling of RoPE for longer contexts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            self,
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "no_rope_layer_interval",
            "attention_chunk_size",
            "temperature_floor",
        )
        check_positive(
            self, "moe_layer_interval", "intermediate_size_mlp", "intermediate_size", "num_experts", "experts_per_token"
        )
        check_heads(self, self.head_dim)
        check_experts(self)

    def is_full(self, layer: int) -> bool:
        """Whether layer number `layer`, counted from 0, attends to the full document."""
        return (layer + 1) % self.no_rope_layer_interval == 0

    def has_experts(self, layer: int) -> bool:
        """Whether layer number `layer`, counted from 0, has experts."""
        return (layer + 1) % self.moe_layer_interval == 0


class Positions(NamedTuple):
    """Position encoding of both kinds of layers.

    rotation     RoPE for queries and keys of the chunked layers
    temperature  float32 [B, S, 1, 1], multiplies the queries of the full layers
    """

    rotation: Rotation
    temperature: Tensor


class ChunkedAttention(GroupedQueryAttention):
    """Attention with RoPE and, with `qk_norm`, an RMSNorm of queries and keys after RoPE that has no weight."""

    def __init__(self, config: Llama4Config) -> None:
        super().__init__(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)
        self.qk_norm_eps = config.norm_eps if config.qk_norm else None

    def encode_keys(self, k_BSGD: Tensor, positions: Positions) -> Tensor:
        k = super().encode_keys(k_BSGD, positions.rotation)
        return k if self.qk_norm_eps is None else F.rms_norm(k, (self.head_dim,), eps=self.qk_norm_eps)


class FullAttention(GroupedQueryAttention):
    """Attention without RoPE; positions enter only as the temperature of the queries (arXiv 2501.19399)."""

    def __init__(self, config: Llama4Config) -> None:
        super().__init__(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)

    def encode_keys(self, k_BSGD: Tensor, positions: Positions) -> Tensor:
        return k_BSGD

    def encode_queries(self, q_BSHD: Tensor, positions: Positions) -> Tensor:
        return (q_BSHD * positions.temperature).to(q_BSHD.dtype)


def build_moe(config: Llama4Config) -> MoE:
    """Build an MoE whose scores are sigmoids without normalization and multiply the input of the experts."""
    router = Router(
        config.hidden_size,
        config.num_experts,
        config.experts_per_token,
        score="sigmoid",
        aux_loss_coef=config.aux_loss_coef,
    )
    experts = Experts(config.num_experts, config.hidden_size, config.intermediate_size)
    return MoE(router, experts, SwiGLU(config.hidden_size, config.intermediate_size), score_before_experts=True)


class Llama4(Decoder):
    def build_block(self, index: int) -> Block:
        config = self.config
        full = config.is_full(index)
        attention = FullAttention(config) if full else ChunkedAttention(config)
        mlp = (
            build_moe(config) if config.has_experts(index) else SwiGLU(config.hidden_size, config.intermediate_size_mlp)
        )
        return Block(attention, mlp, self.build_norm, mask_name="full" if full else "chunked")

    def get_attention_masks(self, batch: Batch, tokenizer: object = None) -> dict[str, AttentionMask]:
        """Return `chunked` and `full`: causal attention within each document, and for `chunked` within each chunk."""
        rows, length = batch.shape
        full = causal(rows, length, device=batch.tokens.device) & document(batch.document_ids)
        return {"chunked": full & chunked(batch.positions, self.config.attention_chunk_size), "full": full}

    def encode_positions(self, positions: Tensor) -> Positions:
        log_steps = ((positions.float() + 1) / self.config.temperature_floor).floor().log1p()
        temperature = 1 + self.config.temperature_scale * log_steps[:, :, None, None]
        return Positions(super().encode_positions(positions), temperature)


published = partial(
    Llama4Config,
    vocab_size=202_048,
    hidden_size=5120,
    num_layers=48,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    attention_chunk_size=8192,
    intermediate_size_mlp=16_384,
    intermediate_size=8192,
    rope_theta=500_000.0,
)

LLAMA4 = Family(
    name="llama4",
    model=Llama4,
    config=Llama4Config,
    presets={
        "debug": Llama4Config(
            vocab_size=512,
            hidden_size=64,
            num_layers=4,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            attention_chunk_size=16,
            intermediate_size_mlp=128,
            intermediate_size=64,
            num_experts=4,
        ),
        "tiny": Llama4Config(),
        "scout": published(  # 17B active of 109B, 16 experts
            num_experts=16,
            moe_layer_interval=1,
            rope_scaling=Llama3RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0),
        ),
        "maverick": published(num_experts=128, moe_layer_interval=2, qk_norm=False),  # 17B active of 401B
    },
    hf=LLAMA4_HF,
    recipes={"debug": debug, "tiny": tiny, "scout": on_gpus(1e-4), "maverick": on_gpus(8e-5)},
)
