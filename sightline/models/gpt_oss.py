"""gpt-oss (arXiv 2508.10925): windowed and full layers by turns, learned sinks, experts with a clamped SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sightline.batch import Batch
from sightline.config.recipes import debug, on_gpus, tiny
from sightline.layers import Experts, GroupedQueryAttention, MoE, Router, YarnScaling
from sightline.masks import AttentionMask, causal, document, sliding_window
from sightline.models.block import Block
from sightline.models.checks import check_experts, check_heads, check_positive
from sightline.models.decoder import Decoder, DecoderConfig
from sightline.models.family import Family
from sightline.models.hf.gpt_oss import GPT_OSS_HF


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(DecoderConfig):
    """The sizes of a gpt-oss."""

    layers: int = 6
    """Blocks of attention and experts; the first, third, ... attend within the window, the others to everything."""
    heads: int = 8
    """Query heads (H)."""
    kv_heads: int = 4
    """Key/value heads (G); each serves heads / kv-heads query heads."""
    head_size: int = 32
    """Channels of a head (D), an even number."""
    window: int = 128
    """Keys that a token sees in a windowed layer, itself included."""
    ffn: int = 344
    """Inner width of an expert."""
    experts: int = 8
    """Experts of a layer (E)."""
    experts_per_token: int = 2
    """Experts that a token is sent to (K)."""
    auxiliary_loss: float = 0.001
    """Weight of the loss that keeps the load of the experts even."""
    rope_scaling: YarnScaling | None = None
    """YaRN's stretch of RoPE to longer contexts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "heads", "kv_heads", "head_size", "window", "ffn", "experts", "experts_per_token")
        check_heads(self, self.head_size)
        check_experts(self)


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(1.702 gate) * (up + 1), with gate at most 7 and up within -7 and 7."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def build_moe(config: GptOssConfig) -> MoE:
    router = Router(
        config.width,
        config.experts,
        config.experts_per_token,
        renormalize=True,
        bias=True,
        auxiliary=config.auxiliary_loss,
    )
    return MoE(router, Experts(config.experts, config.width, config.ffn, bias=True, activation=clamped_swiglu))


class GptOss(Decoder):
    def build_block(self, index: int) -> Block:
        config = self.config
        attention = GroupedQueryAttention(
            config.width, config.heads, config.kv_heads, config.head_size, bias=True, sinks=True
        )
        mask_name = "full" if index % 2 else "window"
        return Block(attention, build_moe(config), self.build_norm, mask_name=mask_name, names=("attention", "moe"))

    def get_attention_masks(self, batch: Batch, tokenizer: object = None) -> dict[str, AttentionMask]:
        """In its own document a token sees the window that ends with it, or itself and all that comes before it."""
        rows, length = batch.shape
        own_document = document(batch.document_ids)
        return {
            "window": sliding_window(rows, length, self.config.window, device=batch.tokens.device) & own_document,
            "full": causal(rows, length, device=batch.tokens.device) & own_document,
        }


published = partial(
    GptOssConfig,
    vocab_size=201_088,
    width=2880,
    heads=64,
    kv_heads=8,
    head_size=64,
    window=128,
    ffn=2880,
    experts_per_token=4,
    rope_theta=150_000.0,
    rope_scaling=YarnScaling(factor=32.0, original_context=4096, truncate=False),
)

GPT_OSS = Family(
    name="gpt_oss",
    model=GptOss,
    config=GptOssConfig,
    presets={
        "debug": GptOssConfig(
            vocab_size=512, width=64, layers=2, heads=4, kv_heads=2, head_size=16, window=16, ffn=64, experts=4
        ),
        "tiny": GptOssConfig(),
        "20b": published(layers=24, experts=32),
        "120b": published(layers=36, experts=128),
    },
    hf=GPT_OSS_HF,
    recipes={"debug": debug, "tiny": tiny, "20b": on_gpus(2e-4), "120b": on_gpus(1e-4)},
)
