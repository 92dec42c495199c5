"""Qwen 3 (arXiv 2505.09388): Llama layers with QK norm and an independent head dim; dense or mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from sightline.config.recipes import debug, on_gpus, tiny
from sightline.layers import Experts, GroupedQueryAttention, MoE, Router, SwiGLU, YarnScaling
from sightline.models.block import Block
from sightline.models.checks import check_experts, check_heads, check_positive
from sightline.models.decoder import Decoder, DecoderConfig
from sightline.models.family import Family
from sightline.models.hf.qwen3 import QWEN3_HF


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    """Config of a Qwen 3 model."""

    num_heads: int = 8
    """Number of query heads (H)."""
    num_kv_heads: int = 4
    """Number of key/value heads (G); must divide num-heads."""
    head_dim: int = 64
    """Channels of an attention head (D); must be even. num-heads * head-dim may differ from hidden-size."""
    intermediate_size: int = 688
    """Intermediate size of the feed-forward layers, or of each expert."""
    num_experts: int = 0
    """Number of experts per layer (E); 0 builds dense feed-forward layers."""
    experts_per_token: int = 8
    """Number of experts that the router selects for each token (K)."""
    aux_loss_coef: float = 0.001
    """Coefficient of the auxiliary load-balancing loss; 0 disables it."""
    rope_theta: float = 1_000_000.0
    """Base of the RoPE frequencies; the longest wavelength is about 2 pi rope-theta tokens."""
    rope_scaling: YarnScaling | None = None
    """YaRN scaling of RoPE for longer contexts."""
    norm_eps: float = 1e-6
    """Epsilon added to the mean square in RMSNorm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "experts_per_token")
        check_heads(self, self.head_dim)
        if self.num_experts:
            check_positive(self, "num_experts")
            check_experts(self)


def build_moe(config: Qwen3Config) -> MoE:
    router = Router(
        config.hidden_size,
        config.num_experts,
        config.experts_per_token,
        renormalize=True,
        aux_loss_coef=config.aux_loss_coef,
    )
    return MoE(router, Experts(config.num_experts, config.hidden_size, config.intermediate_size))


class Qwen3(Decoder):
    def build_block(self, index: int) -> Block:
        config = self.config
        attention = GroupedQueryAttention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, qk_norm_eps=config.norm_eps
        )
        mlp = build_moe(config) if config.num_experts else SwiGLU(config.hidden_size, config.intermediate_size)
        return Block(attention, mlp, self.build_norm)


small = partial(Qwen3Config, vocab_size=512, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32)
published = partial(Qwen3Config, vocab_size=151_936, num_kv_heads=8, head_dim=128)

QWEN3 = Family(
    name="qwen3",
    model=Qwen3,
    config=Qwen3Config,
    presets={
        "debug": small(intermediate_size=128),
        "debug-moe": small(intermediate_size=64, num_experts=8, experts_per_token=2),
        "tiny": Qwen3Config(tied_embeddings=True),
        "tiny-moe": Qwen3Config(intermediate_size=172, num_experts=16, experts_per_token=4, tied_embeddings=True),
        "0.6b": published(hidden_size=1024, num_layers=28, num_heads=16, intermediate_size=3072, tied_embeddings=True),
        "1.7b": published(hidden_size=2048, num_layers=28, num_heads=16, intermediate_size=6144, tied_embeddings=True),
        "4b": published(hidden_size=2560, num_layers=36, num_heads=32, intermediate_size=9728, tied_embeddings=True),
        "8b": published(hidden_size=4096, num_layers=36, num_heads=32, intermediate_size=12_288),
        "14b": published(hidden_size=5120, num_layers=40, num_heads=40, intermediate_size=17_408),
        "32b": published(hidden_size=5120, num_layers=64, num_heads=64, intermediate_size=25_600),
        "30b-a3b": published(
            hidden_size=2048, num_layers=48, num_heads=32, num_kv_heads=4, intermediate_size=768, num_experts=128
        ),
        "235b-a22b": published(
            hidden_size=4096, num_layers=94, num_heads=64, num_kv_heads=4, intermediate_size=1536, num_experts=128
        ),
    },
    hf=QWEN3_HF,
    recipes={
        **dict.fromkeys(("debug", "debug-moe"), debug),
        **dict.fromkeys(("tiny", "tiny-moe"), tiny),
        **dict.fromkeys(("0.6b", "1.7b", "4b", "8b"), on_gpus(3e-4)),
        "14b": on_gpus(2e-4),
        "32b": on_gpus(1.5e-4),
        "30b-a3b": on_gpus(2e-4),
        "235b-a22b": on_gpus(1e-4),
    },
)
