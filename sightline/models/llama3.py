"""Llama 3 (arXiv 2407.21783): grouped-query attention, RoPE, SwiGLU, pre-norm. Read top to bottom, small to large."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sightline.attention import Lowered
from sightline.batch import Batch
from sightline.layers import (
    GroupedQueryAttention,
    KeyValueCache,
    Llama3RopeScaling,
    RMSNorm,
    Rotation,
    SwiGLU,
    build_rotation,
    rope_frequencies,
)
from sightline.masks import AttentionMask, causal, document
from sightline.models.checks import check_positive
from sightline.models.decoder import Decoder, Layer
from sightline.models.weights import HuggingFace, Weight, expect, read_rope, read_scaling, write_rope
from sightline.numbers import check_divisible


@dataclass(frozen=True, kw_only=True)
class Llama3Config:
    """The sizes of a Llama 3."""

    vocab_size: int = 8192
    """Tokens of the vocabulary (V)."""
    width: int = 256
    """Size of a token's hidden state."""
    layers: int = 6
    """Blocks of attention and feed-forward."""
    heads: int = 8
    """Query heads (H)."""
    kv_heads: int = 4
    """Key/value heads (G); each serves heads / kv-heads query heads."""
    head_size: int | None = None
    """Channels of a head (D), an even number; without it, width / heads."""
    ffn: int = 688
    """Inner width of the feed-forward layer."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies: the slowest channel turns about once in 2 pi theta tokens."""
    rope_scaling: Llama3RopeScaling | None = None
    """Llama 3.1's stretch of RoPE to longer contexts."""
    norm_eps: float = 1e-5
    """Added to the mean square in the norms."""
    tied_embeddings: bool = False
    """Use the embedding as the output projection too."""

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "width", "layers", "heads", "kv_heads", "ffn", "rope_theta", "norm_eps")
        check_divisible("model.heads", self.heads, "model.kv-heads", self.kv_heads, "key/value heads")
        if self.head_size is None and self.width % self.heads:
            raise ValueError(
                f"model.width {self.width} is not divisible by model.heads {self.heads}; "
                "change one of them or state model.head-size"
            )
        if self.resolved_head_size < 2 or self.resolved_head_size % 2:
            raise ValueError(
                f"the size of a head must be even, because RoPE turns pairs of channels, got "
                f"{self.resolved_head_size}; change model.width / model.heads or state model.head-size"
            )

    @property
    def resolved_head_size(self) -> int:
        """Channels of a head (D)."""
        return self.width // self.heads if self.head_size is None else self.head_size


def _published(*, factor: float, **sizes: int) -> Llama3Config:
    """What the published sizes share; Llama 3.1 scales RoPE by 8, the small sizes of 3.2 by 32 and tie embeddings."""
    return Llama3Config(
        vocab_size=128_256,
        kv_heads=8,
        rope_theta=500_000.0,
        rope_scaling=Llama3RopeScaling(factor=factor),
        tied_embeddings=factor == 32,
        **sizes,
    )


LLAMA3_SIZES = {
    "debug": Llama3Config(vocab_size=512, width=64, layers=2, heads=4, kv_heads=2, ffn=128),
    "tiny": Llama3Config(vocab_size=8192, width=256, layers=6, heads=8, kv_heads=4, ffn=688),
    "1b": _published(width=2048, layers=16, heads=32, ffn=8192, factor=32),
    "3b": _published(width=3072, layers=28, heads=24, ffn=8192, factor=32),
    "8b": _published(width=4096, layers=32, heads=32, ffn=14_336, factor=8),
    "70b": _published(width=8192, layers=80, heads=64, ffn=28_672, factor=8),
    "405b": _published(width=16_384, layers=126, heads=128, ffn=53_248, factor=8),
}


class Block(Layer):
    """One layer: h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: Llama3Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = GroupedQueryAttention(config.width, config.heads, config.kv_heads, config.resolved_head_size)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = SwiGLU(config.width, config.ffn)

    def init_weights(self, std: float, output_std: float) -> None:
        self.attention_norm.init_weights()
        self.attention.init_weights(std, output_std)
        self.mlp_norm.init_weights()
        self.mlp.init_weights(std, output_std)

    def forward(self, h: Tensor, mask: Lowered, rotation: Rotation, cache: KeyValueCache | None = None) -> Tensor:
        """h [B, S, W] -> [B, S, W]."""
        h = h + self.attention(self.attention_norm(h), mask, rotation, cache)
        return h + self.mlp(self.mlp_norm(h))


class Llama3(Decoder):
    """The whole model."""

    def __init__(self, config: Llama3Config, *, attention_backend: str = "auto") -> None:
        super().__init__(config, (Block(config) for _ in range(config.layers)), attention_backend=attention_backend)

    def get_attention_masks(self, batch: Batch, tokenizer: object = None) -> AttentionMask:
        """Every token sees itself and what comes before it in its own document."""
        rows, length = batch.shape
        return causal(rows, length, device=batch.tokens.device) & document(batch.document_ids)

    def encode_positions(self, positions: Tensor) -> Rotation:
        config = self.config
        frequencies = rope_frequencies(
            config.resolved_head_size, config.rope_theta, config.rope_scaling, device=positions.device
        )
        return build_rotation(positions, frequencies)

    def flops_per_token(self) -> float:
        """Forward and backward FLOPs of one token in matrix products, attention scores left out.

        6 a matmul parameter: 2 forward, 4 backward. The output projection counts, also where it is the embedding; the
        embedding's lookup and the norms do not.
        """
        config = self.config
        heads = 2 * (config.heads + config.kv_heads)  # query and output, key and value
        layer = config.width * (heads * config.resolved_head_size + 3 * config.ffn)
        return 6.0 * (config.layers * layer + config.width * config.vocab_size)

    def attention_flops_per_pair(self) -> float:
        """Forward and backward FLOPs of one visible (query, key) pair over all layers.

        12 a channel of every query head: q k and p v take 2 each forward and twice that backward (PaLM's convention,
        arXiv 2204.02311: what a kernel recomputes in its backward does not count).
        """
        return 12.0 * self.config.heads * self.config.resolved_head_size * self.config.layers


def config_from_hf(hf: dict[str, Any]) -> Llama3Config:
    """From the fields of a config.json."""
    expect(hf, hidden_act="silu", attention_bias=False, mlp_bias=False)
    rope = read_rope(hf, "llama3")
    return Llama3Config(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_size=hf.get("head_dim"),
        ffn=hf["intermediate_size"],
        rope_theta=rope["rope_theta"],
        rope_scaling=read_scaling(rope),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tied_embeddings=hf.get("tie_word_embeddings", False),
    )


def config_to_hf(config: Llama3Config) -> dict[str, Any]:
    """And back."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.resolved_head_size,
        "intermediate_size": config.ffn,
        **write_rope(config.rope_theta, config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
    }


def hf_weights(config: Llama3Config) -> Iterator[Weight]:
    """Which tensor of theirs is which of ours."""
    yield Weight("model.embed_tokens.weight", "embedding.weight")
    for i in range(config.layers):
        for theirs, ours in (
            ("input_layernorm", "attention_norm"),
            ("self_attn.q_proj", "attention.query"),
            ("self_attn.k_proj", "attention.key"),
            ("self_attn.v_proj", "attention.value"),
            ("self_attn.o_proj", "attention.output"),
            ("post_attention_layernorm", "mlp_norm"),
            ("mlp.gate_proj", "mlp.gate"),
            ("mlp.up_proj", "mlp.up"),
            ("mlp.down_proj", "mlp.down"),
        ):
            yield Weight(f"model.layers.{i}.{theirs}.weight", f"layers.{i}.{ours}.weight")
    yield Weight("model.norm.weight", "norm.weight")
    if not config.tied_embeddings:
        yield Weight("lm_head.weight", "output.weight")


LLAMA3_HF = HuggingFace(
    model=Llama3,
    architectures=("LlamaForCausalLM",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=hf_weights,
)
