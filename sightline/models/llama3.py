"""Llama 3 (arXiv 2407.21783): grouped-query attention, RoPE, SwiGLU, pre-norm."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from sightline.config import Checkpoint, Optimizer, Training, Validation
from sightline.config.recipes import debug, on_gpus, template
from sightline.layers import GroupedQueryAttention, Llama3RopeScaling, SwiGLU
from sightline.models.block import Block
from sightline.models.checks import check_heads, check_positive
from sightline.models.decoder import Decoder, DecoderConfig
from sightline.models.family import Family
from sightline.models.hf.llama3 import LLAMA3_HF


@dataclass(frozen=True, kw_only=True)
class Llama3Config(DecoderConfig):
    """The sizes of a Llama 3."""

    heads: int = 8
    """Query heads (H)."""
    kv_heads: int = 4
    """Key/value heads (G); each serves heads / kv-heads query heads."""
    head_size: int | None = None
    """Channels of a head (D), an even number; without it, width / heads."""
    ffn: int = 688
    """Inner width of the feed-forward layer."""
    rope_scaling: Llama3RopeScaling | None = None
    """Llama 3.1's stretch of RoPE to longer contexts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "heads", "kv_heads", "ffn")
        if self.head_size is None and self.width % self.heads:
            raise ValueError(
                f"model.width {self.width} is not divisible by model.heads {self.heads}; "
                "change one of them or state model.head-size"
            )
        check_heads(self, self.resolved_head_size)

    @property
    def resolved_head_size(self) -> int:
        """Channels of a head (D)."""
        return self.width // self.heads if self.head_size is None else self.head_size


class Llama3(Decoder):
    def build_block(self, index: int) -> Block:
        config = self.config
        attention = GroupedQueryAttention(config.width, config.heads, config.kv_heads, config.resolved_head_size)
        return Block(attention, SwiGLU(config.width, config.ffn), self.build_norm)

    @property
    def rotary_size(self) -> int:
        return self.config.resolved_head_size


llama_3_1 = partial(
    Llama3Config, vocab_size=128_256, kv_heads=8, rope_theta=500_000.0, rope_scaling=Llama3RopeScaling(factor=8)
)
llama_3_2 = partial(llama_3_1, rope_scaling=Llama3RopeScaling(factor=32), tied_embeddings=True)

LLAMA3 = Family(
    name="llama3",
    model=Llama3,
    config=Llama3Config,
    presets={
        "debug": Llama3Config(vocab_size=512, width=64, layers=2, heads=4, kv_heads=2, ffn=128),
        "tiny": Llama3Config(vocab_size=8192, width=256, layers=6, heads=8, kv_heads=4, ffn=688),
        "1b": llama_3_2(width=2048, layers=16, heads=32, ffn=8192),
        "3b": llama_3_2(width=3072, layers=28, heads=24, ffn=8192),
        "8b": llama_3_1(width=4096, layers=32, heads=32, ffn=14_336),
        "70b": llama_3_1(width=8192, layers=80, heads=64, ffn=28_672),
        "405b": llama_3_1(width=16_384, layers=126, heads=128, ffn=53_248),
    },
    hf=LLAMA3_HF,
    recipes={
        "debug": debug,
        "tiny": template(
            # A small batch takes more steps from the same tokens, which is what so short a training needs.
            training=Training(steps=395, sequence_length=1024, global_batch_size=1, micro_batch_size=1),
            optimizer=Optimizer(learning_rate=2e-3, warmup_steps=30),
            validation=Validation(every=50, rows=8),
            checkpoint=Checkpoint(every=100),
        ),
        **dict.fromkeys(("1b", "3b", "8b"), on_gpus(3e-4)),
        "70b": on_gpus(1.5e-4),
        "405b": on_gpus(8e-5),
    },
)
