"""Hugging Face format of Qwen 3: transformers has one class for dense models and one for models with experts."""

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
    rename_experts,
    write_fields,
)
from sightline.models.hf.rope import rope_fields, write_rope

DENSE = {**DECODER, **HEADS, "intermediate_size": "intermediate_size"}
MOE = {
    **DECODER,
    **HEADS,
    "intermediate_size": "moe_intermediate_size",
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "aux_loss_coef": "router_aux_loss_coef",
}


def config_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    expect(hf, hidden_act="silu", attention_bias=False, use_sliding_window=False)
    names = DENSE
    if hf["architectures"][0] == "Qwen3MoeForCausalLM":
        expect(hf, decoder_sparse_step=1, norm_topk_prob=True)
        expect({**hf, "mlp_only_layers": hf.get("mlp_only_layers") or []}, mlp_only_layers=[])
        names = MOE if "num_experts" in hf else {**MOE, "num_experts": "num_local_experts"}
    fields = read_fields(hf, names, norm_eps=1e-6, tied_embeddings=False, aux_loss_coef=0.001)
    return {**fields, **rope_fields(hf, "yarn")}


def config_to_hf(config: Any) -> dict[str, Any]:
    if config.num_experts:
        kind = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "norm_topk_prob": True}
    else:
        kind = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    return {
        **kind,
        **write_fields(config, MOE if config.num_experts else DENSE),
        **write_rope(config.rope_theta, config.rope_scaling),
    }


def _layer_weights(config: Any, index: int, theirs: str, ours: str) -> Iterator[Weight]:
    yield from rename(theirs, ours, NORMS)
    attention = {**ATTENTION, "q_norm": "query_norm", "k_norm": "key_norm"}
    yield from rename(f"{theirs}.self_attn", f"{ours}.attention", attention)
    if config.num_experts:
        yield Weight(f"{theirs}.mlp.gate.weight", f"{ours}.mlp.router.weight")
        yield from rename_experts(f"{theirs}.mlp.experts", f"{ours}.mlp.experts", config.num_experts)
    else:
        yield from rename(f"{theirs}.mlp", f"{ours}.mlp", MLP)


QWEN3_HF = HuggingFace(
    architectures=("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=lambda config: decoder_weights(config, _layer_weights),
)
