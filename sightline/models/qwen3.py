"""Qwen 3 (arXiv 2505.09388): Llama's layer with normed queries and keys and heads of a size of their own; dense or
with experts."""

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
    """The sizes of a Qwen 3."""

    heads: int = 8
    """Query heads (H)."""
    kv_heads: int = 4
    """Key/value heads (G); each serves heads / kv-heads query heads."""
    head_size: int = 64
    """Channels of a head (D), an even number; heads * head-size need not be the width."""
    ffn: int = 688
    """Inner width of the feed-forward layer, or of each expert."""
    experts: int = 0
    """Experts of a layer (E); 0 is one feed-forward layer for every token."""
    experts_per_token: int = 8
    """Experts that a token is sent to (K), where there are experts."""
    auxiliary_loss: float = 0.001
    """Weight of the loss that keeps the load of the experts even."""
    rope_theta: float = 1_000_000.0
    """Base of the rotary frequencies: the slowest channel turns about once in 2 pi theta tokens."""
    rope_scaling: YarnScaling | None = None
    """YaRN's stretch of RoPE to longer contexts."""
    norm_eps: float = 1e-6
    """Added to the mean square in the norms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "heads", "kv_heads", "head_size", "ffn", "experts_per_token")
        check_heads(self, self.head_size)
        if self.experts:
            check_positive(self, "experts")
            check_experts(self)


def build_moe(config: Qwen3Config) -> MoE:
    router = Router(
        config.width, config.experts, config.experts_per_token, renormalize=True, auxiliary=config.auxiliary_loss
    )
    return MoE(router, Experts(config.experts, config.width, config.ffn))


class Qwen3(Decoder):
    def build_block(self, index: int) -> Block:
        config = self.config
        attention = GroupedQueryAttention(
            config.width, config.heads, config.kv_heads, config.head_size, qk_norm_eps=config.norm_eps
        )
        mlp = build_moe(config) if config.experts else SwiGLU(config.width, config.ffn)
        return Block(attention, mlp, self.build_norm)


small = partial(Qwen3Config, vocab_size=512, width=64, layers=2, heads=4, kv_heads=2, head_size=32)
published = partial(Qwen3Config, vocab_size=151_936, kv_heads=8, head_size=128)

QWEN3 = Family(
    name="qwen3",
    model=Qwen3,
    config=Qwen3Config,
    presets={
        "debug": small(ffn=128),
        "debug-moe": small(ffn=64, experts=8, experts_per_token=2),
        "tiny": Qwen3Config(tied_embeddings=True),
        "tiny-moe": Qwen3Config(ffn=172, experts=16, experts_per_token=4, tied_embeddings=True),
        "0.6b": published(width=1024, layers=28, heads=16, ffn=3072, tied_embeddings=True),
        "1.7b": published(width=2048, layers=28, heads=16, ffn=6144, tied_embeddings=True),
        "4b": published(width=2560, layers=36, heads=32, ffn=9728, tied_embeddings=True),
        "8b": published(width=4096, layers=36, heads=32, ffn=12_288),
        "14b": published(width=5120, layers=40, heads=40, ffn=17_408),
        "32b": published(width=5120, layers=64, heads=64, ffn=25_600),
        "30b-a3b": published(width=2048, layers=48, heads=32, kv_heads=4, ffn=768, experts=128),
        "235b-a22b": published(width=4096, layers=94, heads=64, kv_heads=4, ffn=1536, experts=128),
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
