"""Hugging Face format of the Llama 4 text model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sightline.models.hf.format import (
    DECODER,
    HEADS,
    MLP,
    NORMS,
    HuggingFace,
    View,
    Weight,
    decoder_weights,
    expect,
    read_field,
    read_fields,
    rename,
    rename_fused_experts,
    rename_rope_weight,
    write_fields,
)
from sightline.models.hf.rope import rope_fields, write_rope

FIELDS = {
    **DECODER,
    **HEADS,
    "no_rope_layer_interval": "no_rope_layer_interval",
    "attention_chunk_size": "attention_chunk_size",
    "qk_norm": "use_qk_norm",
    "temperature_scale": "attn_scale",
    "temperature_floor": "floor_scale",
    "moe_layer_interval": "interleave_moe_layer_step",
    "intermediate_size_mlp": "intermediate_size_mlp",
    "intermediate_size": "intermediate_size",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "aux_loss_coef": "router_aux_loss_coef",
}


def config_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of the text model's config.json."""
    expect(hf, hidden_act="silu", attention_bias=False)
    missing = {"no_rope_layer_interval": 4, "temperature_scale": 0.1, "temperature_floor": 8192}
    fields = read_fields(hf, FIELDS, aux_loss_coef=0.001, tied_embeddings=False, **missing)
    fields |= rope_fields(hf, "llama3")
    if not hf.get("attn_temperature_tuning", True):
        fields["temperature_scale"] = 0.0
    layers = range(read_field(hf, "num_hidden_layers", int, 0))
    intervals = ("no_rope_layer_interval", 4), ("interleave_moe_layer_step", 1)
    no_rope, moe = (max(1, read_field(hf, name, int, missing)) for name, missing in intervals)  # the config refuses 0
    full = layers[no_rope - 1 :: no_rope]
    if hf.get("no_rope_layers"):  # [] in published files, which give only the interval
        expect(hf, no_rope_layers=[int(i not in full) for i in layers])
    expect(
        hf,
        moe_layers=list(layers[moe - 1 :: moe]),
        layer_types=["full_attention" if i in full else "chunked_attention" for i in layers],
    )
    return fields


def config_to_hf(config: Any) -> dict[str, Any]:
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        **write_fields(config, FIELDS),
        "attn_temperature_tuning": config.temperature_scale != 0,
        **write_rope(config.rope_theta, config.rope_scaling),
    }


def _layer_weights(config: Any, index: int, theirs: str, ours: str) -> Iterator[Weight]:
    yield from rename(theirs, ours, NORMS)
    # Attention scores do not depend on the channel order, so the full layers, which have no RoPE, are reordered too.
    for their_name, name, heads in (("q_proj", "query", config.num_heads), ("k_proj", "key", config.num_kv_heads)):
        names = f"{theirs}.self_attn.{their_name}.weight", f"{ours}.attention.{name}.weight"
        yield from rename_rope_weight(*names, heads, (heads * config.head_dim, config.hidden_size))
    yield from rename(f"{theirs}.self_attn", f"{ours}.attention", {"v_proj": "value", "o_proj": "output"})
    theirs, ours = f"{theirs}.feed_forward", f"{ours}.mlp"
    if config.has_experts(index):
        yield Weight(f"{theirs}.router.weight", f"{ours}.router.weight")
        # Theirs has gate and up in one tensor, all channels of gate first.
        halves: dict[str, View] = {
            "gate": lambda t: t[..., : config.intermediate_size],
            "up": lambda t: t[..., config.intermediate_size :],
        }
        yield from rename_fused_experts(config, f"{theirs}.experts", f"{ours}.experts", halves)
        theirs, ours = f"{theirs}.shared_expert", f"{ours}.shared"
    yield from rename(theirs, ours, MLP)


LLAMA4_HF = HuggingFace(
    architectures=("Llama4ForCausalLM",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=lambda config: decoder_weights(config, _layer_weights),
)
