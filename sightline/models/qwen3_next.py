"""Qwen3-Next (Qwen, 2025): three of four layers are recurrent (gated delta rule, arXiv 2412.06464), the fourth has
gated attention; each is followed by a mixture of experts.

Both kinds of layers use the same mask: a recurrent layer resets its state where a document starts.
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
    Linear,
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
    """Config of a Qwen3-Next model."""

    num_layers: int = 4
    """Number of decoder layers."""
    full_attention_interval: int = 4
    """Every n-th layer has attention; the others are recurrent (gated delta rule)."""
    num_heads: int = 4
    """Number of query heads in attention layers (H)."""
    num_kv_heads: int = 2
    """Number of key/value heads in attention layers (G); must divide num-heads."""
    head_dim: int = 64
    """Channels of a head in attention layers (D)."""
    partial_rotary_factor: float = 0.25
    """Fraction of head-dim that RoPE rotates, the first channels of each head; their number must be even."""
    linear_num_key_heads: int = 4
    """Number of query and key heads in recurrent layers."""
    linear_num_value_heads: int = 8
    """Number of value heads in recurrent layers; must be a multiple of linear-num-key-heads."""
    linear_key_head_dim: int = 32
    """Channels of a query or key head in recurrent layers."""
    linear_value_head_dim: int = 32
    """Channels of a value head in recurrent layers."""
    linear_conv_kernel_dim: int = 4
    """Kernel size, in tokens, of the causal convolution in recurrent layers."""
    num_experts: int = 8
    """Number of routed experts per layer (E); 0 builds dense feed-forward layers."""
    experts_per_token: int = 2
    """Number of routed experts that the router selects for each token (K)."""
    moe_intermediate_size: int = 256
    """Intermediate size of each expert."""
    shared_expert_intermediate_size: int = 256
    """Intermediate size of the shared expert."""
    intermediate_size: int = 688
    """Intermediate size of the dense feed-forward layers, if num-experts is 0."""
    aux_loss_coef: float = 0.001
    """Coefficient of the auxiliary load-balancing loss; 0 disables it."""
    norm_eps: float = 1e-6
    """Epsilon added to the mean square in RMSNorm."""

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
                f"model.partial-rotary-factor {self.partial_rotary_factor} of model.head-dim {self.head_dim} is "
                f"{self.rotary_dim} channels; expected 2 to {self.head_dim}: use a factor up to 1, or a larger head dim"
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
        """Number of channels of each attention head that RoPE rotates."""
        return int(self.head_dim * self.partial_rotary_factor)

    def has_attention(self, layer: int) -> bool:
        """Whether layer number `layer`, counted from 0, has attention; otherwise it is recurrent."""
        return (layer + 1) % self.full_attention_interval == 0


class GatedAttention(GroupedQueryAttention):
    """Grouped-query attention with an output gate computed from the query token (arXiv 2505.06708).

    Queries and keys are normalized per head, and RoPE rotates only their first channels.
    """

    SHARD_DIMS: ClassVar = {**GroupedQueryAttention.SHARD_DIMS, "gate": 0}

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)
        self.query_norm = ZeroCenteredRMSNorm(config.head_dim, config.norm_eps)
        self.key_norm = ZeroCenteredRMSNorm(config.head_dim, config.norm_eps)
        self.gate = Linear(config.hidden_size, config.num_heads * config.head_dim, bias=False)

    def init_weights(self, std: float, output_std: float) -> None:
        super().init_weights(std, output_std)
        nn.init.normal_(self.gate.weight, std=std)

    def encode_keys(self, k_BSGD: Tensor, encoding: Rotation) -> Tensor:
        rotary_dim = encoding.cos.shape[-1]
        return torch.cat([rotate(k_BSGD[..., :rotary_dim], encoding), k_BSGD[..., rotary_dim:]], dim=-1)

    def attend_heads(self, x: Tensor, mask: Lowered, encoding: Rotation, cache: KeyValueCache | None = None) -> Tensor:
        return super().attend_heads(x, mask, encoding, cache) * self.gate(x).sigmoid()


class SharedExpert(SwiGLU):
    """Shared expert whose output is scaled by a sigmoid gate of each token."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(hidden_size, intermediate_size)
        self.share = Linear(hidden_size, 1, bias=False)

    def init_weights(self, std: float, output_std: float) -> None:
        super().init_weights(std, output_std)
        nn.init.normal_(self.share.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.share(x).sigmoid()


def build_delta_net(config: Qwen3NextConfig) -> GatedDeltaNet:
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
        mixer = GatedAttention(config) if config.has_attention(index) else build_delta_net(config)
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
