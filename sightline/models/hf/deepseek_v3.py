"""Hugging Face format of DeepSeek V3."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sightline.models.hf.format import (
    DECODER,
    MLP,
    NORMS,
    HuggingFace,
    Weight,
    decoder_weights,
    expect,
    read_fields,
    rename,
    rename_experts,
    rename_rope_weight,
    write_fields,
)
from sightline.models.hf.rope import rope_fields, write_rope

FIELDS = {
    **DECODER,
    "num_dense_layers": "first_k_dense_replace",
    "num_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "intermediate_size": "intermediate_size",
    "moe_intermediate_size": "moe_intermediate_size",
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
    "num_expert_groups": "n_group",
    "num_limited_groups": "topk_group",
    "routed_scaling_factor": "routed_scaling_factor",
}


def config_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """Convert the fields of config.json.

    The MTP module is loaded only if config.json has our field `mtp_loss_weight`. The field num_nextn_predict_layers
    does not tell: transformers drops the module and still writes 1.
    """
    expect(hf, hidden_act="silu", attention_bias=False, norm_topk_prob=True, rope_interleave=True)
    expect(hf, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    fields = read_fields(hf, FIELDS, tied_embeddings=False)
    return {**fields, "mtp_loss_weight": hf.get("mtp_loss_weight"), **rope_fields(hf, "yarn")}


def config_to_hf(config: Any) -> dict[str, Any]:
    mtp: dict[str, Any] = {"num_nextn_predict_layers": 0}
    if config.mtp_loss_weight is not None:
        mtp = {"num_nextn_predict_layers": 1, "mtp_loss_weight": config.mtp_loss_weight}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **write_fields(config, FIELDS),
        "num_key_value_heads": config.num_heads,
        **mtp,
        **write_rope(config.rope_theta, config.rope_scaling),
    }


def weights(config: Any) -> Iterator[Weight]:
    yield from decoder_weights(config, _layer_weights)
    if config.mtp_loss_weight is not None:
        theirs = f"model.layers.{config.num_layers}"
        # The MTP module has experts if the model's last layer has.
        yield from _layer_weights(config, config.num_layers - 1, theirs, "prediction.block")
        mtp = {"enorm": "embedding_norm", "hnorm": "hidden_norm", "eh_proj": "join", "shared_head.norm": "norm"}
        yield from rename(theirs, "prediction", mtp)


def _layer_weights(config: Any, index: int, theirs: str, ours: str) -> Iterator[Weight]:
    yield from rename(theirs, ours, NORMS)
    yield from _attention_weights(config, f"{theirs}.self_attn", f"{ours}.attention")
    theirs, ours = f"{theirs}.mlp", f"{ours}.mlp"
    if index < config.num_dense_layers:
        yield from rename(theirs, ours, MLP)
        return
    yield from rename(f"{theirs}.shared_experts", f"{ours}.shared", MLP)
    yield from rename_experts(f"{theirs}.experts", f"{ours}.experts", config.num_experts)
    yield Weight(f"{theirs}.gate.weight", f"{ours}.router.weight")
    yield Weight(f"{theirs}.gate.e_score_correction_bias", f"{ours}.router.expert_bias")


def _attention_weights(config: Any, theirs: str, ours: str) -> Iterator[Weight]:
    yield from rename(theirs, ours, {"kv_a_layernorm": "kv_norm", "kv_b_proj": "kv", "o_proj": "output"})
    query = "q_proj"
    if config.q_lora_rank is not None:
        query = "q_b_proj"
        yield from rename(theirs, ours, {"q_a_proj": "query_down", "q_a_layernorm": "query_norm"})
    shape = (
        config.num_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim),
        config.q_lora_rank or config.hidden_size,
    )
    names = f"{theirs}.{query}.weight", f"{ours}.query.weight"
    yield from rename_rope_weight(*names, config.num_heads, shape, nope_dim=config.qk_nope_head_dim)
    shape = config.kv_lora_rank + config.qk_rope_head_dim, config.hidden_size
    names = f"{theirs}.kv_a_proj_with_mqa.weight", f"{ours}.kv_down.weight"
    yield from rename_rope_weight(*names, 1, shape, nope_dim=config.kv_lora_rank)


DEEPSEEK_V3_HF = HuggingFace(
    architectures=("DeepseekV3ForCausalLM",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=weights,
    # In the published files layer 61 is the MTP module, with copies of the embedding and the output head.
    ignored=r"lm_head\.weight|.*\.rotary_emb\.inv_freq|model\.layers\.61\..*|.*\.shared_head\.head\.weight"
    r"|model\.layers\.\d+\.embed_tokens\.weight",
)
