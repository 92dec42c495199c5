"""Ministral: Llama's layers by turns within a window and over the whole document.

With `anchors`, the windows never lose the first tokens of a document, so that a text may grow far past the window
(StreamingLLM, arXiv 2309.17453).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sightline.attention import Lowered
from sightline.batch import Batch
from sightline.layers import (
    GroupedQueryAttention,
    KeyValueCache,
    RMSNorm,
    Rotation,
    SwiGLU,
    build_rotation,
    rope_frequencies,
)
from sightline.masks import AttentionMask, causal, document, prefix_lm, sliding_window
from sightline.models import llama3
from sightline.models.checks import check_heads, check_positive
from sightline.models.decoder import Decoder, Layer
from sightline.models.weights import HuggingFace, expect, read_rope, write_rope


@dataclass(frozen=True, kw_only=True)
class MinistralConfig:
    """The sizes of a Ministral."""

    vocab_size: int = 8192
    """Tokens of the vocabulary (V)."""
    width: int = 256
    """Size of a token's hidden state."""
    layers: int = 6
    """Blocks of attention and feed-forward; the first, third, ... attend within the window, the others fully."""
    heads: int = 8
    """Query heads (H)."""
    kv_heads: int = 4
    """Key/value heads (G); each serves heads / kv-heads query heads."""
    head_size: int = 32
    """Channels of a head (D), an even number."""
    window: int = 128
    """Keys that a token sees in a windowed layer, itself included."""
    anchors: int = 0
    """First tokens of a document that windowed layers see from everywhere in it."""
    ffn: int = 688
    """Inner width of the feed-forward layer."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square in the norms."""
    tied_embeddings: bool = False
    """Use the embedding as the output projection too."""

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "width", "layers", "heads", "kv_heads", "head_size", "window", "ffn")
        check_heads(self.heads, self.kv_heads, self.head_size)
        if self.anchors < 0:
            raise ValueError(f"model.anchors must be at least 0, got {self.anchors}")


MINISTRAL_SIZES = {
    "debug": MinistralConfig(
        vocab_size=512, width=64, layers=2, heads=4, kv_heads=2, head_size=16, window=16, anchors=2, ffn=128
    ),
    "tiny": MinistralConfig(anchors=4),
}


class Block(Layer):
    """One layer: h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: MinistralConfig, index: int) -> None:
        super().__init__()
        self.mask_name = "full" if index % 2 else "window"
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = GroupedQueryAttention(config.width, config.heads, config.kv_heads, config.head_size)
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


class Ministral(Decoder):
    """The whole model."""

    def __init__(self, config: MinistralConfig, *, attention_backend: str = "auto") -> None:
        super().__init__(config, (Block(config, i) for i in range(config.layers)), attention_backend=attention_backend)

    def get_attention_masks(self, batch: Batch, tokenizer: object = None) -> dict[str, AttentionMask]:
        """In its own document a token sees itself and what comes before it: all of that, or of it the window that ends
        with the token and the anchors."""
        rows, length = batch.shape
        past = causal(rows, length, device=batch.tokens.device) & document(batch.document_ids)
        window = sliding_window(rows, length, self.config.window, device=batch.tokens.device)
        anchors = prefix_lm(batch.positions, torch.full_like(batch.positions, self.config.anchors))
        return {"window": (window | anchors) & past, "full": past}

    def encode_positions(self, positions: Tensor) -> Rotation:
        frequencies = rope_frequencies(self.config.head_size, self.config.rope_theta, device=positions.device)
        return build_rotation(positions, frequencies)


def config_from_hf(hf: dict[str, Any]) -> MinistralConfig:
    """From the fields of a config.json."""
    layers = hf["num_hidden_layers"]
    expect(hf, hidden_act="silu", layer_types=layer_types(layers))
    return MinistralConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=layers,
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        head_size=hf["head_dim"],
        window=hf["sliding_window"],
        ffn=hf["intermediate_size"],
        rope_theta=read_rope(hf)["rope_theta"],
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tied_embeddings=hf.get("tie_word_embeddings", False),
    )


def config_to_hf(config: MinistralConfig) -> dict[str, Any]:
    """And back. Errors: ValueError for anchors, which theirs does not have."""
    if config.anchors:
        raise ValueError(f"a MinistralForCausalLM has no anchors; expected model.anchors 0, got {config.anchors}")
    return {
        "architectures": ["MinistralForCausalLM"],
        "model_type": "ministral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "layer_types": layer_types(config.layers),
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "sliding_window": config.window,
        "intermediate_size": config.ffn,
        **write_rope(config.rope_theta, None),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
    }


def layer_types(layers: int) -> list[str]:
    """As config.json calls the masks of the layers."""
    return ["full_attention" if index % 2 else "sliding_attention" for index in range(layers)]


MINISTRAL_HF = HuggingFace(
    model=Ministral,
    architectures=("MinistralForCausalLM",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=llama3.hf_weights,  # theirs calls its tensors what Llama does, and so do we
)
