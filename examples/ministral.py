"""Ministral: Llama layers that alternate between sliding-window attention and full attention.

With `anchors`, sliding-window layers also attend to the first tokens of the document, so that a text may grow far past
the window (StreamingLLM, arXiv 2309.17453).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sightline.batch import Batch
from sightline.config.recipes import debug
from sightline.layers import GroupedQueryAttention, SwiGLU
from sightline.masks import AttentionMask, prefix_lm, sliding_window
from sightline.models import Block, Decoder, DecoderConfig, Family
from sightline.models.checks import check_heads, check_positive
from sightline.models.hf.format import DECODER, HEADS, HuggingFace, expect, read_fields, write_fields
from sightline.models.hf.llama3 import weights
from sightline.models.hf.rope import read_rope, write_rope


@dataclass(frozen=True, kw_only=True)
class MinistralConfig(DecoderConfig):
    """Config of a Ministral model. The first, third, ... layers use the sliding window, the others full attention."""

    num_heads: int = 8
    """Number of query heads (H)."""
    num_kv_heads: int = 4
    """Number of key/value heads (G); must divide num-heads."""
    head_dim: int = 32
    """Channels of an attention head (D); must be even."""
    sliding_window: int = 128
    """Number of keys that a token attends to in sliding-window layers, itself included."""
    anchors: int = 0
    """Number of first tokens of a document that sliding-window layers always attend to."""
    intermediate_size: int = 688
    """Intermediate size of the feed-forward layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_heads", "num_kv_heads", "head_dim", "sliding_window", "intermediate_size")
        check_heads(self, self.head_dim)
        if self.anchors < 0:
            raise ValueError(f"model.anchors must be at least 0, got {self.anchors}")


class Ministral(Decoder):
    def build_block(self, index: int) -> Block:
        config = self.config
        attention = GroupedQueryAttention(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim)
        mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        return Block(attention, mlp, self.build_norm, mask_name="full" if index % 2 else "window")

    def get_attention_masks(self, batch: Batch, tokenizer: object = None) -> dict[str, AttentionMask]:
        """Return `full`, causal attention within each document, and `window`, limited to sliding window and anchors."""
        full = super().get_attention_masks(batch)
        window = sliding_window(*batch.shape, self.config.sliding_window, device=batch.tokens.device)
        anchors = prefix_lm(batch.positions, torch.full_like(batch.positions, self.config.anchors))
        return {"window": (window | anchors) & full, "full": full}


FIELDS = {**DECODER, **HEADS, "sliding_window": "sliding_window", "intermediate_size": "intermediate_size"}


def config_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of config.json to those of our config."""
    fields = read_fields(hf, FIELDS, norm_eps=1e-6, tied_embeddings=False)
    expect(hf, hidden_act="silu", layer_types=layer_types(fields["num_layers"]))
    return {**fields, "rope_theta": read_rope(hf)["rope_theta"]}


def config_to_hf(config: MinistralConfig) -> dict[str, Any]:
    """Convert our config to the fields of config.json.

    Raises:
        ValueError: if the model has anchors, which transformers does not support.
    """
    if config.anchors:
        raise ValueError(f"a MinistralForCausalLM has no anchors; expected model.anchors 0, got {config.anchors}")
    return {
        "architectures": ["MinistralForCausalLM"],
        "model_type": "ministral",
        **write_fields(config, FIELDS),
        "layer_types": layer_types(config.num_layers),
        **write_rope(config.rope_theta, None),
    }


def layer_types(num_layers: int) -> list[str]:
    """Return the attention type of every layer, as in config.json."""
    return ["full_attention" if index % 2 else "sliding_attention" for index in range(num_layers)]


MINISTRAL = Family(
    name="ministral",
    model=Ministral,
    config=MinistralConfig,
    presets={
        "debug": MinistralConfig(
            vocab_size=512,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            sliding_window=16,
            anchors=2,
            intermediate_size=128,
        ),
        "tiny": MinistralConfig(anchors=4),
    },
    hf=HuggingFace(
        architectures=("MinistralForCausalLM",),
        config_from_hf=config_from_hf,
        config_to_hf=config_to_hf,
        weights=weights,  # the tensor names are those of Llama 3, in transformers and here
    ),
)
RUN = debug("ministral-debug", MINISTRAL.presets["debug"])
