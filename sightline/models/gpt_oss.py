"""gpt-oss (arXiv 2508.10925): alternating sliding-window and full attention, sinks, experts with clamped SwiGLU."""

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
    """Config of a gpt-oss model."""

    num_layers: int = 6
    """Number of decoder layers. The first, third, ... use sliding-window attention, the others full attention."""
    num_heads: int = 8
    """Number of query heads (H)."""
    num_kv_heads: int = 4
    """Number of key/value heads (G); must divide num-heads."""
    head_dim: int = 32
    """Channels of an attention head (D); must be even."""
    sliding_window: int = 128
    """Number of keys that a token attends to in sliding-window layers, itself included."""
    intermediate_size: int = 344
    """Intermediate size of each expert."""
    num_experts: int = 8
    """Number of experts per layer (E)."""
    experts_per_token: int = 2
    """Number of experts that the router selects for each token (K)."""
    aux_loss_coef: float = 0.001
    """Coefficient of the auxiliary load-balancing loss; 0 disables it."""
    rope_scaling: YarnScaling | None = None
    """YaRN scaling of RoPE for longer contexts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(
            self,
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "sliding_window",
            "intermediate_size",
            "num_experts",
            "experts_per_token",
        )
        check_heads(self, self.head_dim)
        check_experts(self)


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return gate * sigmoid(1.702 gate) * (up + 1), with gate clamped to at most 7 and up to [-7, 7]."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def build_moe(config: GptOssConfig) -> MoE:
    router = Router(
        config.hidden_size,
        config.num_experts,
        config.experts_per_token,
        renormalize=True,
        bias=True,
        aux_loss_coef=config.aux_loss_coef,
    )
    sizes = config.num_experts, config.hidden_size, config.intermediate_size
    return MoE(router, Experts(*sizes, bias=True, activation=clamped_swiglu))


class GptOss(Decoder):
    def build_block(self, index: int) -> Block:
        config = self.config
        attention = GroupedQueryAttention(
            config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim, bias=True, sinks=True
        )
        mask_name = "full" if index % 2 else "window"
        return Block(attention, build_moe(config), self.build_norm, mask_name=mask_name, names=("attention", "moe"))

    def get_attention_masks(self, batch: Batch, tokenizer: object = None) -> dict[str, AttentionMask]:
        """Return `window` and `full`: causal attention within each document, for `window` within the sliding window."""
        rows, length = batch.shape
        device, same_document = batch.tokens.device, document(batch.document_ids)
        return {
            "window": sliding_window(rows, length, self.config.sliding_window, device=device) & same_document,
            "full": causal(rows, length, device=device) & same_document,
        }


published = partial(
    GptOssConfig,
    vocab_size=201_088,
    hidden_size=2880,
    num_heads=64,
    num_kv_heads=8,
    head_dim=64,
    sliding_window=128,
    intermediate_size=2880,
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
            vocab_size=512,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            sliding_window=16,
            intermediate_size=64,
            num_experts=4,
        ),
        "tiny": GptOssConfig(),
        "20b": published(num_layers=24, num_experts=32),
        "120b": published(num_layers=36, num_experts=128),
    },
    hf=GPT_OSS_HF,
    recipes={"debug": debug, "tiny": tiny, "20b": on_gpus(2e-4), "120b": on_gpus(1e-4)},
)
