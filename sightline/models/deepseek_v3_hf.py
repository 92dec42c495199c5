"""DeepSeek V3 in Hugging Face's form: its config.json and the names of its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from sightline.models.deepseek_v3 import DeepseekV3, DeepseekV3Config
from sightline.models.weights import HuggingFace, View, Weight, expect, read_rope, read_scaling, write_rope


def config_from_hf(hf: dict[str, Any]) -> DeepseekV3Config:
    """From the fields of a config.json.

    The layer that looks further is only read where our own `mtp_loss_weight` says that it is in the files:
    transformers, which does without it, still writes num_nextn_predict_layers = 1.
    """
    expect(hf, hidden_act="silu", attention_bias=False, norm_topk_prob=True, rope_interleave=True)
    expect(hf, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1)
    rope = read_rope(hf, "yarn")
    return DeepseekV3Config(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        dense_layers=hf["first_k_dense_replace"],
        heads=hf["num_attention_heads"],
        query_rank=hf["q_lora_rank"],
        kv_rank=hf["kv_lora_rank"],
        plain_size=hf["qk_nope_head_dim"],
        rope_size=hf["qk_rope_head_dim"],
        value_size=hf["v_head_dim"],
        ffn=hf["intermediate_size"],
        expert_ffn=hf["moe_intermediate_size"],
        experts=hf["n_routed_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        shared_experts=hf["n_shared_experts"],
        expert_groups=hf["n_group"],
        groups_per_token=hf["topk_group"],
        expert_scale=hf["routed_scaling_factor"],
        prediction_weight=hf.get("mtp_loss_weight"),
        rope_theta=rope["rope_theta"],
        rope_scaling=read_scaling(rope),
        norm_eps=hf["rms_norm_eps"],
        tied_embeddings=hf.get("tie_word_embeddings", False),
    )


def config_to_hf(config: DeepseekV3Config) -> dict[str, Any]:
    """And back."""
    prediction: dict[str, Any] = {"num_nextn_predict_layers": 0}
    if config.prediction_weight is not None:
        prediction = {"num_nextn_predict_layers": 1, "mtp_loss_weight": config.prediction_weight}
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "first_k_dense_replace": config.dense_layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "q_lora_rank": config.query_rank,
        "kv_lora_rank": config.kv_rank,
        "qk_nope_head_dim": config.plain_size,
        "qk_rope_head_dim": config.rope_size,
        "v_head_dim": config.value_size,
        "intermediate_size": config.ffn,
        "moe_intermediate_size": config.expert_ffn,
        "n_routed_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "n_shared_experts": config.shared_experts,
        "n_group": config.expert_groups,
        "topk_group": config.groups_per_token,
        "routed_scaling_factor": config.expert_scale,
        **prediction,
        **write_rope(config.rope_theta, config.rope_scaling),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
    }


def hf_weights(config: DeepseekV3Config) -> Iterator[Weight]:
    """Which tensor of theirs is which of ours."""
    yield Weight("model.embed_tokens.weight", "embedding.weight")
    for i in range(config.layers):
        yield from _block_weights(config, f"model.layers.{i}", f"layers.{i}", dense=i < config.dense_layers)
    yield Weight("model.norm.weight", "norm.weight")
    if not config.tied_embeddings:
        yield Weight("lm_head.weight", "output.weight")
    if config.prediction_weight is not None:
        theirs = f"model.layers.{config.layers}"
        yield from _block_weights(config, theirs, "prediction.block", dense=config.dense_layers == config.layers)
        for their_name, name in (
            ("enorm", "embedding_norm"),
            ("hnorm", "hidden_norm"),
            ("eh_proj", "join"),
            ("shared_head.norm", "norm"),
        ):
            yield Weight(f"{theirs}.{their_name}.weight", f"prediction.{name}.weight")


def _block_weights(config: DeepseekV3Config, theirs: str, ours: str, *, dense: bool) -> Iterator[Weight]:
    yield Weight(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight")
    yield Weight(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight")
    yield from _attention_weights(config, f"{theirs}.self_attn", f"{ours}.attention")
    for their_name, name in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
        if dense:
            yield Weight(f"{theirs}.mlp.{their_name}.weight", f"{ours}.mlp.{name}.weight")
            continue
        yield Weight(f"{theirs}.mlp.shared_experts.{their_name}.weight", f"{ours}.mlp.shared.{name}.weight")
        for e in range(config.experts):
            one = f"{theirs}.mlp.experts.{e}.{their_name}.weight"
            yield Weight(one, f"{ours}.mlp.experts.{name}", of_ours=_expert(e))
    if not dense:
        yield Weight(f"{theirs}.mlp.gate.weight", f"{ours}.mlp.router.weight")
        yield Weight(f"{theirs}.mlp.gate.e_score_correction_bias", f"{ours}.mlp.router.balance")


def _expert(number: int) -> View:
    return lambda t: t[number]


def _attention_weights(config: DeepseekV3Config, theirs: str, ours: str) -> Iterator[Weight]:
    """Theirs turns channel 2i with 2i + 1, ours i with i + rope_size / 2: the rows of both halves change places."""
    for their_name, name in (("kv_a_layernorm", "kv_norm"), ("kv_b_proj", "kv"), ("o_proj", "output")):
        yield Weight(f"{theirs}.{their_name}.weight", f"{ours}.{name}.weight")
    query = "q_proj"
    if config.query_rank is not None:
        query = "q_b_proj"
        yield Weight(f"{theirs}.q_a_proj.weight", f"{ours}.query_down.weight")
        yield Weight(f"{theirs}.q_a_layernorm.weight", f"{ours}.query_norm.weight")
    heads, size = config.heads, config.plain_size + config.rope_size
    yield from _turned_weights(
        f"{theirs}.{query}.weight",
        f"{ours}.query.weight",
        lambda t: t.unflatten(0, (heads, size)),
        config.plain_size,
        (heads * size, config.query_rank or config.width),
    )
    yield from _turned_weights(
        f"{theirs}.kv_a_proj_with_mqa.weight",
        f"{ours}.kv_down.weight",
        lambda t: t[None],
        config.kv_rank,
        (config.kv_rank + config.rope_size, config.width),
    )


def _turned_weights(theirs: str, ours: str, by_head: View, plain: int, shape: tuple[int, ...]) -> Iterator[Weight]:
    """by_head gives [H, D, W], of whose D rows those behind the first `plain` are turned."""

    def head(t: Tensor) -> Tensor:
        return by_head(t)[:, :plain]

    yield Weight(theirs, ours, of_theirs=head, of_ours=head, shape=shape)
    yield Weight(
        theirs,
        ours,
        of_theirs=lambda t: by_head(t)[:, plain:].unflatten(1, (-1, 2)).transpose(1, 2),
        of_ours=lambda t: by_head(t)[:, plain:].unflatten(1, (2, -1)),
        shape=shape,
    )


DEEPSEEK_V3_HF = HuggingFace(
    model=DeepseekV3,
    architectures=("DeepseekV3ForCausalLM",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=hf_weights,
    # In the published files layer 61 is the one that looks further; embedding and head are there once more.
    ignored=r"lm_head\.weight|.*\.rotary_emb\.inv_freq|model\.layers\.61\..*|.*\.shared_head\.head\.weight"
    r"|model\.layers\.\d+\.embed_tokens\.weight",
)
