"""gpt-oss (arXiv 2508.10925): windowed and full layers by turns, learned sinks, experts with a clamped SwiGLU.

Read top to bottom, small to large.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sightline.attention import Lowered
from sightline.batch import Batch
from sightline.layers import (
    Experts,
    GroupedQueryAttention,
    KeyValueCache,
    MoE,
    RMSNorm,
    Rotation,
    Router,
    YarnScaling,
    build_rotation,
    rope_frequencies,
)
from sightline.masks import AttentionMask, causal, document, sliding_window
from sightline.models.checks import check_experts, check_heads, check_positive
from sightline.models.decoder import Decoder, Layer
from sightline.models.weights import HuggingFace, View, Weight, expect, read_rope, read_scaling, write_rope


@dataclass(frozen=True, kw_only=True)
class GptOssConfig:
    """The sizes of a gpt-oss."""

    vocab_size: int = 8192
    """Tokens of the vocabulary (V)."""
    width: int = 256
    """Size of a token's hidden state."""
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
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies: the slowest channel turns about once in 2 pi theta tokens."""
    rope_scaling: YarnScaling | None = None
    """YaRN's stretch of RoPE to longer contexts."""
    norm_eps: float = 1e-5
    """Added to the mean square in the norms."""
    tied_embeddings: bool = False
    """Use the embedding as the output projection too."""

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "width", "layers", "heads", "kv_heads", "head_size", "window", "ffn")
        check_positive(self, "experts", "experts_per_token", "rope_theta", "norm_eps")
        check_heads(self.heads, self.kv_heads, self.head_size)
        check_experts(self.experts, self.experts_per_token)


def _published(*, layers: int, experts: int) -> GptOssConfig:
    return GptOssConfig(
        vocab_size=201_088,
        width=2880,
        layers=layers,
        heads=64,
        kv_heads=8,
        head_size=64,
        window=128,
        ffn=2880,
        experts=experts,
        experts_per_token=4,
        rope_theta=150_000.0,
        rope_scaling=YarnScaling(factor=32.0, original_context=4096, truncate=False),
    )


GPT_OSS_SIZES = {
    "debug": GptOssConfig(
        vocab_size=512, width=64, layers=2, heads=4, kv_heads=2, head_size=16, window=16, ffn=64, experts=4
    ),
    "tiny": GptOssConfig(),
    "20b": _published(layers=24, experts=32),
    "120b": _published(layers=36, experts=128),
}


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate * sigmoid(1.702 gate) * (up + 1), with gate at most 7 and up within -7 and 7."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


class Block(Layer):
    """One layer: h + attention(norm(h)), then h + moe(norm(h))."""

    def __init__(self, config: GptOssConfig, index: int) -> None:
        super().__init__()
        self.mask_name = "full" if index % 2 else "window"
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = GroupedQueryAttention(
            config.width, config.heads, config.kv_heads, config.head_size, bias=True, sinks=True
        )
        self.moe_norm = RMSNorm(config.width, config.norm_eps)
        self.moe = MoE(
            Router(
                config.width,
                config.experts,
                config.experts_per_token,
                renormalize=True,
                bias=True,
                auxiliary=config.auxiliary_loss,
            ),
            Experts(config.experts, config.width, config.ffn, bias=True, activation=clamped_swiglu),
        )

    def init_weights(self, std: float, output_std: float) -> None:
        self.attention_norm.init_weights()
        self.attention.init_weights(std, output_std)
        self.moe_norm.init_weights()
        self.moe.init_weights(std, output_std)

    def forward(self, h: Tensor, mask: Lowered, rotation: Rotation, cache: KeyValueCache | None = None) -> Tensor:
        """h [B, S, W] -> [B, S, W]."""
        h = h + self.attention(self.attention_norm(h), mask, rotation, cache)
        return h + self.moe(self.moe_norm(h), mask.visible)


class GptOss(Decoder):
    """The whole model."""

    def __init__(self, config: GptOssConfig, *, attention_backend: str = "auto") -> None:
        super().__init__(config, (Block(config, i) for i in range(config.layers)), attention_backend=attention_backend)

    def get_attention_masks(self, batch: Batch, tokenizer: object = None) -> dict[str, AttentionMask]:
        """In its own document a token sees the window that ends with it, or itself and all that comes before it."""
        rows, length = batch.shape
        own_document = document(batch.document_ids)
        return {
            "window": sliding_window(rows, length, self.config.window, device=batch.tokens.device) & own_document,
            "full": causal(rows, length, device=batch.tokens.device) & own_document,
        }

    def encode_positions(self, positions: Tensor) -> Rotation:
        config = self.config
        scaling = config.rope_scaling
        frequencies = rope_frequencies(config.head_size, config.rope_theta, scaling, device=positions.device)
        return build_rotation(positions, frequencies, 1.0 if scaling is None else scaling.rotation_factor)

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs of one token in matrix products, attention scores left out.

        6 a matmul parameter that the token meets: of the experts only those it is sent to. The output projection
        counts, also where it is the embedding; the embedding's lookup, norms and biases do not.
        """
        config = self.config
        heads = 2 * (config.heads + config.kv_heads)  # query and output, key and value
        experts = config.experts + config.experts_per_token * 3 * config.ffn  # the router's choice, and the chosen
        layer = config.width * (heads * config.head_size + experts)
        return 6.0 * (config.layers * layer + config.width * config.vocab_size)

    def attention_flops_per_pair(self) -> dict[str, float]:
        """Forward and backward FLOPs of one visible (query, key) pair over the layers that use the mask: 12 a channel
        of every query head, as in Llama 3."""
        config = self.config
        layer = 12.0 * config.heads * config.head_size
        return {"window": layer * ((config.layers + 1) // 2), "full": layer * (config.layers // 2)}


def config_from_hf(hf: dict[str, Any]) -> GptOssConfig:
    """From the fields of a config.json."""
    expect(hf, hidden_act="silu", attention_bias=True, swiglu_alpha=1.702, swiglu_limit=7.0)
    layers = hf["num_hidden_layers"]
    expect(hf, layer_types=["full_attention" if i % 2 else "sliding_attention" for i in range(layers)])
    rope = read_rope(hf, "yarn")
    return GptOssConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=layers,
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        head_size=hf["head_dim"],
        window=hf["sliding_window"],
        ffn=hf["intermediate_size"],
        experts=hf["num_local_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        auxiliary_loss=hf.get("router_aux_loss_coef", 0.001),
        rope_theta=rope["rope_theta"],
        rope_scaling=read_scaling(rope),
        norm_eps=hf.get("rms_norm_eps", 1e-5),
        tied_embeddings=hf.get("tie_word_embeddings", False),
    )


def config_to_hf(config: GptOssConfig) -> dict[str, Any]:
    """And back. Without a word about RoPE their config would have the scaling of the published models."""
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    rope = plain if config.rope_scaling is None else write_rope(config.rope_theta, config.rope_scaling)
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "sliding_window": config.window,
        "intermediate_size": config.ffn,
        "num_local_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "router_aux_loss_coef": config.auxiliary_loss,
        **rope,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
    }


def hf_weights(config: GptOssConfig) -> Iterator[Weight]:
    """Which tensor of theirs is which of ours. Theirs have gate and up in one, channel by channel."""
    yield Weight("model.embed_tokens.weight", "embedding.weight")
    for i in range(config.layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        yield Weight(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight")
        yield Weight(f"{theirs}.self_attn.sinks", f"{ours}.attention.sinks")
        for their_name, name in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "output")):
            yield Weight(f"{theirs}.self_attn.{their_name}.weight", f"{ours}.attention.{name}.weight")
            yield Weight(f"{theirs}.self_attn.{their_name}.bias", f"{ours}.attention.{name}.bias")
        yield Weight(f"{theirs}.post_attention_layernorm.weight", f"{ours}.moe_norm.weight")
        yield Weight(f"{theirs}.mlp.router.weight", f"{ours}.moe.router.weight")
        yield Weight(f"{theirs}.mlp.router.bias", f"{ours}.moe.router.bias")
        yield from _expert_weights(config, f"{theirs}.mlp.experts", f"{ours}.moe.experts")
    yield Weight("model.norm.weight", "norm.weight")
    if not config.tied_embeddings:
        yield Weight("lm_head.weight", "output.weight")


def _expert_weights(config: GptOssConfig, theirs: str, ours: str) -> Iterator[Weight]:
    both = 2 * config.ffn
    halves: dict[str, View] = {"gate": lambda t: t[..., 0::2], "up": lambda t: t[..., 1::2]}
    for name, half in halves.items():
        yield Weight(
            f"{theirs}.gate_up_proj",
            f"{ours}.{name}",
            of_theirs=half,
            of_ours=lambda t: t.mT,
            shape=(config.experts, config.width, both),
        )
        yield Weight(f"{theirs}.gate_up_proj_bias", f"{ours}.{name}_bias", of_theirs=half, shape=(config.experts, both))
    yield Weight(f"{theirs}.down_proj", f"{ours}.down", of_ours=lambda t: t.mT)
    yield Weight(f"{theirs}.down_proj_bias", f"{ours}.down_bias")


GPT_OSS_HF = HuggingFace(
    model=GptOss,
    architectures=("GptOssForCausalLM",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=hf_weights,
)
