"""Llama 4's text model (Meta, 2025): layers that rotate and see a chunk, every fourth without either, and experts."""

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
    """The sizes of a Llama 4."""

    num_layers: int = 8
    """Blocks of attention and feed-forward."""
    num_heads: int = 8
    """Query heads (H)."""
    num_kv_heads: int = 4
    """Key/value heads (G); each serves heads / kv-heads query heads."""
    head_dim: int = 32
    """Channels of a head (D), an even number."""
    no_rope_layer_interval: int = 4
    """Every so manieth layer sees the whole document and rotates nothing; the others rotate and see their chunk."""
    attention_chunk_size: int = 128
    """Tokens of a chunk, counted inside the document."""
    qk_norm: bool = True
    """Norm the rotated queries and keys of the chunked layers, without a weight."""
    temperature_scale: float = 0.1
    """In full layers, the query at position p is multiplied by 1 + temperature-scale * ln(1 + floor((p + 1) /
    temperature-floor)), so that attention stays sharp over many keys; 0 leaves queries as they are."""
    temperature_floor: int = 8192
    """Tokens after which a query grows."""
    moe_layer_interval: int = 2
    """Every so manieth layer has experts, the others one feed-forward layer for all tokens."""
    intermediate_size_mlp: int = 688
    """Inner width of the feed-forward layer for all tokens."""
    intermediate_size: int = 344
    """Inner width of an expert, and of the expert that all tokens share."""
    num_experts: int = 8
    """Experts of a layer, the shared one aside (E)."""
    experts_per_token: int = 1
    """Experts that a token is sent to, the shared one aside (K)."""
    aux_loss_coef: float = 0.001
    """Weight of the loss that keeps the load of the experts even."""
    rope_scaling: Llama3RopeScaling | None = None
    """Llama 3.1's stretch of RoPE to longer contexts."""

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
        return (layer + 1) % self.no_rope_layer_interval == 0

    def has_experts(self, layer: int) -> bool:
        return (layer + 1) % self.moe_layer_interval == 0


class Positions(NamedTuple):
    """What the layers need to know of the positions.

    rotation     turns queries and keys of the chunked layers
    temperature  float32 [B, S, 1, 1], multiplies the queries of the full layers
    """

    rotation: Rotation
    temperature: Tensor


class ChunkedAttention(GroupedQueryAttention):
    """Rotates queries and keys, then norms them where `qk_norm_eps` is given: without a weight, unlike its base."""

    def __init__(self, config: Llama4Config) -> None:
        super().__init__(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)
        self.qk_norm_eps = config.norm_eps if config.qk_norm else None

    def encode_keys(self, k_BSGD: Tensor, positions: Positions) -> Tensor:
        k = super().encode_keys(k_BSGD, positions.rotation)
        return k if self.qk_norm_eps is None else F.rms_norm(k, (self.head_dim,), eps=self.qk_norm_eps)


class FullAttention(GroupedQueryAttention):
    """Knows positions only by the temperature of its queries (arXiv 2501.19399)."""

    def __init__(self, config: Llama4Config) -> None:
        super().__init__(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)

    def encode_keys(self, k_BSGD: Tensor, positions: Positions) -> Tensor:
        return k_BSGD

    def encode_queries(self, q_BSHD: Tensor, positions: Positions) -> Tensor:
        return (q_BSHD * positions.temperature).to(q_BSHD.dtype)


def build_moe(config: Llama4Config) -> MoE:
    """A token's weight for an expert is a sigmoid by itself, and multiplies what the expert gets."""
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
        """In its own document a token sees what comes before it, and itself: in its chunk, or all of it."""
        rows, length = batch.shape
        full = causal(rows, length, device=batch.tokens.device) & document(batch.document_ids)
        return {"chunked": full & chunked(batch.positions, self.config.attention_chunk_size), "full": full}

    def encode_positions(self, positions: Tensor) -> Positions:
        grown = ((positions.float() + 1) / self.config.temperature_floor).floor().log1p()
        temperature = 1 + self.config.temperature_scale * grown[:, :, None, None]
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
