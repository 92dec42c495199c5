"""Qwen3-Next (Qwen, 2025): three layers of four have a memory, the gated delta rule (arXiv 2412.06464), the fourth has
gated attention, and a mixture of experts follows each.

One mask serves both kinds of layers: attention obeys it, and the memory is empty where it shows that a document begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sightline.attention import Lowered
from sightline.config.recipes import debug, on_gpus, tiny
from sightline.layers import (
    Experts,
    GatedDeltaNet,
    GroupedQueryAttention,
    KeyValueCache,
    MoE,
    Rotation,
    Router,
    SwiGLU,
    ZeroCenteredRMSNorm,
    rotate,
)
from sightline.models.block import Block
from sightline.models.checks import check_divisible, check_experts, check_heads, check_positive
from sightline.models.decoder import Decoder, DecoderConfig
from sightline.models.family import Family
from sightline.models.hf.qwen3_next import QWEN3_NEXT_HF


@dataclass(frozen=True, kw_only=True)
class Qwen3NextConfig(DecoderConfig):
    """The sizes of a Qwen3-Next."""

    num_layers: int = 4
    """Blocks of memory or attention, and feed-forward."""
    full_attention_interval: int = 4
    """Every so many-th layer has attention, the others a memory."""
    num_heads: int = 4
    """Query heads of attention (H)."""
    num_kv_heads: int = 2
    """Key/value heads of attention (G); each serves heads / kv-heads query heads."""
    head_dim: int = 64
    """Channels of an attention head (D)."""
    partial_rotary_factor: float = 0.25
    """Share of a head's channels that RoPE turns: the first ones, an even number."""
    linear_num_key_heads: int = 4
    """Query and key heads of a memory."""
    linear_num_value_heads: int = 8
    """Value heads of a memory; key head i serves value-heads / key-heads of them."""
    linear_key_head_dim: int = 32
    """Channels of a memory's query and key head."""
    linear_value_head_dim: int = 32
    """Channels of a memory's value head."""
    linear_conv_kernel_dim: int = 4
    """Tokens that the convolution before a memory takes in, the token itself included."""
    num_experts: int = 8
    """Feed-forward layers the router chooses from; 0 is one dense layer for all tokens."""
    experts_per_token: int = 2
    """Experts a token is sent to."""
    moe_intermediate_size: int = 256
    """Inner width of an expert."""
    shared_expert_intermediate_size: int = 256
    """Inner width of the expert that all tokens share."""
    intermediate_size: int = 688
    """Inner width of the dense feed-forward layer, where there are no experts."""
    aux_loss_coef: float = 0.001
    """Coefficient of the loss that balances the load of the experts; 0 is none."""
    norm_eps: float = 1e-6
    """Added to the mean square in the norms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "full_attention_interval", "num_heads", "num_kv_heads", "head_dim")
        check_positive(
            self,
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_conv_kernel_dim",
        )
        if not 2 <= self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"model.partial-rotary-factor {self.partial_rotary_factor} of model.head-dim {self.head_dim} are {self.rotary_dim} "
                "channels; RoPE turns at least 2 and at most all: raise the share, or the head, up to a share of 1"
            )
        check_heads(self, self.rotary_dim)
        check_divisible(self, "linear_num_value_heads", "linear_num_key_heads", "key heads")
        if self.num_experts:
            check_positive(
                self, "num_experts", "experts_per_token", "moe_intermediate_size", "shared_expert_intermediate_size"
            )
            check_experts(self)
        else:
            check_positive(self, "intermediate_size")

    @property
    def rotary_dim(self) -> int:
        """Channels of an attention head that RoPE turns."""
        return int(self.head_dim * self.partial_rotary_factor)

    def has_attention(self, layer: int) -> bool:
        """Whether layer number `layer`, counted from 0, has attention and not a memory."""
        return (layer + 1) % self.full_attention_interval == 0


class GatedAttention(GroupedQueryAttention):
    """Grouped-query attention whose output is gated by the token it is for (arXiv 2505.06708).

    Queries and keys are normed over their head, and RoPE turns only the first of their channels.
    """

    SHARD_DIMS: ClassVar = {**GroupedQueryAttention.SHARD_DIMS, "gate": 0}

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)
        self.query_norm = ZeroCenteredRMSNorm(config.head_dim, config.norm_eps)
        self.key_norm = ZeroCenteredRMSNorm(config.head_dim, config.norm_eps)
        self.gate = nn.Linear(config.hidden_size, config.num_heads * config.head_dim, bias=False)

    def init_weights(self, std: float, output_std: float) -> None:
        super().init_weights(std, output_std)
        nn.init.normal_(self.gate.weight, std=std)

    def encode_keys(self, k_BSGD: Tensor, encoding: Rotation) -> Tensor:
        turned = encoding.cos.shape[-1]
        return torch.cat([rotate(k_BSGD[..., :turned], encoding), k_BSGD[..., turned:]], dim=-1)

    def mix(self, x: Tensor, mask: Lowered, encoding: Rotation, cache: KeyValueCache | None = None) -> Tensor:
        return super().mix(x, mask, encoding, cache) * self.gate(x).sigmoid()


class SharedExpert(SwiGLU):
    """The expert of all tokens; each token says how much it wants of it."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__(width, ffn)
        self.share = nn.Linear(width, 1, bias=False)

    def init_weights(self, std: float, output_std: float) -> None:
        super().init_weights(std, output_std)
        nn.init.normal_(self.share.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.share(x).sigmoid()


def build_memory(config: Qwen3NextConfig) -> GatedDeltaNet:
    return GatedDeltaNet(
        config.hidden_size,
        config.linear_num_key_heads,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
        config.linear_conv_kernel_dim,
        config.norm_eps,
    )


def build_moe(config: Qwen3NextConfig) -> MoE:
    router = Router(
        config.hidden_size,
        config.num_experts,
        config.experts_per_token,
        renormalize=True,
        aux_loss_coef=config.aux_loss_coef,
    )
    experts = Experts(config.num_experts, config.hidden_size, config.moe_intermediate_size)
    return MoE(router, experts, SharedExpert(config.hidden_size, config.shared_expert_intermediate_size))


class Qwen3Next(Decoder):
    def build_block(self, index: int) -> Block:
        config = self.config
        mixer = GatedAttention(config) if config.has_attention(index) else build_memory(config)
        mlp = build_moe(config) if config.num_experts else SwiGLU(config.hidden_size, config.intermediate_size)
        return Block(mixer, mlp, self.build_norm, names=("mixer", "mlp"))

    def build_norm(self) -> ZeroCenteredRMSNorm:
        return ZeroCenteredRMSNorm(self.config.hidden_size, self.config.norm_eps)

    @property
    def rotary_dim(self) -> int:
        return self.config.rotary_dim


QWEN3_NEXT = Family(
    name="qwen3_next",
    model=Qwen3Next,
    config=Qwen3NextConfig,
    presets={
        "debug": Qwen3NextConfig(
            vocab_size=512,
            hidden_size=64,
            head_dim=16,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            num_experts=4,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
        "tiny": Qwen3NextConfig(),
        "80b-a3b": Qwen3NextConfig(
            vocab_size=151_936,
            hidden_size=2048,
            num_layers=48,
            num_heads=16,
            num_kv_heads=2,
            head_dim=256,
            rope_theta=10_000_000.0,
            linear_num_key_heads=16,
            linear_num_value_heads=32,
            linear_key_head_dim=128,
            linear_value_head_dim=128,
            num_experts=512,
            experts_per_token=10,
            moe_intermediate_size=512,
            shared_expert_intermediate_size=512,
        ),
    },
    hf=QWEN3_NEXT_HF,
    recipes={"debug": debug, "tiny": tiny, "80b-a3b": on_gpus(2e-4)},
)
