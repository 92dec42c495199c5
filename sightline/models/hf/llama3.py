"""Hugging Face format of Llama 3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sightline.models.hf.format import (
    ATTENTION,
    DECODER,
    HEADS,
    MLP,
    NORMS,
    HuggingFace,
    Weight,
    decoder_weights,
    expect,
    read_fields,
    rename,
    write_fields,
)
from sightline.models.hf.rope import rope_fields, write_rope

FIELDS = {**DECODER, **HEADS, "intermediate_size": "intermediate_size"}


def config_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    expect(hf, hidden_act="silu", attention_bias=False, mlp_bias=False)
    fields = read_fields(hf, FIELDS, num_kv_heads=None, head_dim=None, norm_eps=1e-6, tied_embeddings=False)
    return {**fields, "num_kv_heads": fields["num_kv_heads"] or fields["num_heads"], **rope_fields(hf, "llama3")}


def config_to_hf(config: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **write_fields(config, FIELDS),
        "head_dim": config.resolved_head_dim,
        **write_rope(config.rope_theta, config.rope_scaling),
    }


def weights(config: Any) -> Iterator[Weight]:
    return decoder_weights(config, layer_weights)


def layer_weights(config: Any, index: int, theirs: str, ours: str) -> Iterator[Weight]:
    yield from rename(theirs, ours, NORMS)
    yield from rename(f"{theirs}.self_attn", f"{ours}.attention", ATTENTION)
    yield from rename(f"{theirs}.mlp", f"{ours}.mlp", MLP)


LLAMA3_HF = HuggingFace(
    architectures=("LlamaForCausalLM",), config_from_hf=config_from_hf, config_to_hf=config_to_hf, weights=weights
)
