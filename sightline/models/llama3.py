"""Llama 3 (arXiv 2407.21783): grouped-query attention, RoPE, SwiGLU, pre-norm."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from sightline.config import CheckpointConfig, OptimizerConfig, TrainingConfig, ValidationConfig
from sightline.config.recipes import debug, on_gpus, template
from sightline.layers import GroupedQueryAttention, Llama3RopeScaling, SwiGLU
from sightline.models.block import Block
from sightline.models.checks import check_heads, check_positive
from sightline.models.decoder import Decoder, DecoderConfig
from sightline.models.family import Family
from sightline.models.hf.llama3 import LLAMA3_HF


@dataclass(frozen=True, kw_only=True)
class Llama3Config(DecoderConfig):
    """Config of a Llama 3 model."""

    num_heads: int = 8
    """Number of query heads (H)."""
    num_kv_heads: int = 4
    """Number of key/value heads (G); must divide num-heads."""
    head_dim: int | None = None
    """Channels of an attention head (D); must be even. None means hidden-size / num-heads."""
    intermediate_size: int = 688
    """Intermediate size of the feed-forward layers."""
    rope_scaling: Llama3RopeScaling | None = None
    """Llama 3.1 scaling of RoPE for longer contexts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_heads", "num_kv_heads", "intermediate_size")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"model.hidden-size {self.hidden_size} is not divisible by model.num-heads {self.num_heads}; "
                "change one of them or set model.head-dim"
            )
        check_heads(self, self.resolved_head_dim)

    @property
    def resolved_head_dim(self) -> int:
        """Channels of an attention head (D): `head_dim`, or its default."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim


class Llama3(Decoder):
    def build_block(self, index: int) -> Block:
        config = self.config
        attention = GroupedQueryAttention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.resolved_head_dim
        )
        return Block(attention, SwiGLU(config.hidden_size, config.intermediate_size), self.build_norm)

    @property
    def rotary_dim(self) -> int:
        return self.config.resolved_head_dim


llama_3_1 = partial(
    Llama3Config, vocab_size=128_256, num_kv_heads=8, rope_theta=500_000.0, rope_scaling=Llama3RopeScaling(factor=8)
)
llama_3_2 = partial(llama_3_1, rope_scaling=Llama3RopeScaling(factor=32), tied_embeddings=True)

LLAMA3 = Family(
    name="llama3",
    model=Llama3,
    config=Llama3Config,
    presets={
        "debug": Llama3Config(
            vocab_size=512, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=128
        ),
        "tiny": Llama3Config(
            vocab_size=8192, hidden_size=256, num_layers=6, num_heads=8, num_kv_heads=4, intermediate_size=688
        ),
        "1b": llama_3_2(hidden_size=2048, num_layers=16, num_heads=32, intermediate_size=8192),
        "3b": llama_3_2(hidden_size=3072, num_layers=28, num_heads=24, intermediate_size=8192),
        "8b": llama_3_1(hidden_size=4096, num_layers=32, num_heads=32, intermediate_size=14_336),
        "70b": llama_3_1(hidden_size=8192, num_layers=80, num_heads=64, intermediate_size=28_672),
        "405b": llama_3_1(hidden_size=16_384, num_layers=126, num_heads=128, intermediate_size=53_248),
    },
    hf=LLAMA3_HF,
    recipes={
        "debug": debug,
        "tiny": template(
            # So short a run needs many steps: a small batch takes more of them from the same tokens.
            training=TrainingConfig(steps=395, sequence_length=1024, global_batch_size=1, micro_batch_size=1),
            optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=30),
            validation=ValidationConfig(every=50, rows=8),
            checkpoint=CheckpointConfig(every=100),
        ),
        **dict.fromkeys(("1b", "3b", "8b"), on_gpus(3e-4)),
        "70b": on_gpus(1.5e-4),
        "405b": on_gpus(8e-5),
    },
)
