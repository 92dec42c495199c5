"""Hugging Face format of gpt-oss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sightline.models.hf.format import (
    ATTENTION,
    DECODER,
    HEADS,
    HuggingFace,
    View,
    Weight,
    decoder_weights,
    expect,
    read_field,
    read_fields,
    rename,
    rename_fused_experts,
    write_fields,
)
from sightline.models.hf.rope import rope_fields, write_rope

FIELDS = {
    **DECODER,
    **HEADS,
    "sliding_window": "sliding_window",
    "intermediate_size": "intermediate_size",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "aux_loss_coef": "router_aux_loss_coef",
}
HALVES: dict[str, View] = {"gate": lambda t: t[..., 0::2], "up": lambda t: t[..., 1::2]}
"""Views of gate and up in their tensor, which interleaves them by channel."""


def config_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    expect(hf, hidden_act="silu", attention_bias=True, swiglu_alpha=1.702, swiglu_limit=7.0)
    fields = read_fields(hf, FIELDS, aux_loss_coef=0.001, norm_eps=1e-5, tied_embeddings=False)
    layers = range(read_field(hf, "num_hidden_layers", int, 0))
    expect(hf, layer_types=["full_attention" if i % 2 else "sliding_attention" for i in layers])
    return {**fields, **rope_fields(hf, "yarn")}


def config_to_hf(config: Any) -> dict[str, Any]:
    """Convert to config.json. RoPE is always given: transformers' default is the scaling of the published models."""
    unscaled = {"rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta}}
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        **write_fields(config, FIELDS),
        **(unscaled if config.rope_scaling is None else write_rope(config.rope_theta, config.rope_scaling)),
    }


def _layer_weights(config: Any, index: int, theirs: str, ours: str) -> Iterator[Weight]:
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "moe_norm"}
    yield from rename(theirs, ours, norms)
    yield Weight(f"{theirs}.self_attn.sinks", f"{ours}.attention.sinks")
    yield from rename(f"{theirs}.self_attn", f"{ours}.attention", ATTENTION, "weight", "bias")
    yield from rename(f"{theirs}.mlp", f"{ours}.moe", {"router": "router"}, "weight", "bias")
    theirs, ours = f"{theirs}.mlp.experts", f"{ours}.moe.experts"
    yield from rename_fused_experts(config, theirs, ours, HALVES)
    for name, half in HALVES.items():
        shape = (config.num_experts, 2 * config.intermediate_size)
        yield Weight(f"{theirs}.gate_up_proj_bias", f"{ours}.{name}_bias", of_theirs=half, shape=shape)
    yield Weight(f"{theirs}.down_proj_bias", f"{ours}.down_bias")


GPT_OSS_HF = HuggingFace(
    architectures=("GptOssForCausalLM",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=lambda config: decoder_weights(config, _layer_weights),
)
