"""Qwen3-Next in Hugging Face directories."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any

from sightline.models.qwen3_next import Qwen3Next, Qwen3NextConfig
from sightline.models.weights import HuggingFace, View, Weight, expect, read_rope


def config_from_hf(hf: dict[str, Any]) -> Qwen3NextConfig:
    """From the fields of a config.json."""
    expect(hf, hidden_act="silu", attention_bias=False, decoder_sparse_step=1, norm_topk_prob=True)
    expect({**hf, "mlp_only_layers": hf.get("mlp_only_layers") or []}, mlp_only_layers=[])
    rope = read_rope(hf)
    every = _attention_every(hf)
    layers = hf["num_hidden_layers"]
    expect(hf, layer_types=_layer_types(layers, every))
    return Qwen3NextConfig(
        vocab_size=hf["vocab_size"],
        width=hf["hidden_size"],
        layers=layers,
        attention_every=every,
        heads=hf["num_attention_heads"],
        kv_heads=hf["num_key_value_heads"],
        head_size=hf["head_dim"],
        rotary_share=rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor", 0.25),
        rope_theta=rope["rope_theta"],
        key_heads=hf["linear_num_key_heads"],
        value_heads=hf["linear_num_value_heads"],
        key_size=hf["linear_key_head_dim"],
        value_size=hf["linear_value_head_dim"],
        taps=hf["linear_conv_kernel_dim"],
        experts=hf["num_experts"],
        experts_per_token=hf["num_experts_per_tok"],
        expert_ffn=hf["moe_intermediate_size"],
        shared_ffn=hf["shared_expert_intermediate_size"],
        ffn=hf["intermediate_size"],
        auxiliary_loss=hf.get("router_aux_loss_coef", 0.001),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tied_embeddings=hf.get("tie_word_embeddings", False),
    )


def _attention_every(hf: dict[str, Any]) -> int:
    """Files say it as an interval, or name the kind of every layer; a model without attention has it in none."""
    kinds = hf.get("layer_types")
    if kinds is None:
        return hf.get("full_attention_interval", 4)
    return kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1


def _layer_types(layers: int, every: int) -> list[str]:
    return ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]


def config_to_hf(config: Qwen3NextConfig) -> dict[str, Any]:
    """And back."""
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "layer_types": _layer_types(config.layers, config.attention_every),
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "partial_rotary_factor": config.rotary_share,
        "rope_theta": config.rope_theta,
        "linear_num_key_heads": config.key_heads,
        "linear_num_value_heads": config.value_heads,
        "linear_key_head_dim": config.key_size,
        "linear_value_head_dim": config.value_size,
        "linear_conv_kernel_dim": config.taps,
        "num_experts": config.experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_ffn,
        "shared_expert_intermediate_size": config.shared_ffn,
        "intermediate_size": config.ffn,
        "router_aux_loss_coef": config.auxiliary_loss,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
    }


def hf_weights(config: Qwen3NextConfig) -> Iterator[Weight]:
    """Which tensor of theirs is which of ours."""
    yield Weight("model.embed_tokens.weight", "embedding.weight")
    for i in range(config.layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        yield Weight(f"{theirs}.input_layernorm.weight", f"{ours}.mixer_norm.weight")
        if config.has_attention(i):
            yield from _attention_weights(config, f"{theirs}.self_attn", f"{ours}.mixer")
        else:
            yield from _memory_weights(config, f"{theirs}.linear_attn", f"{ours}.mixer")
        yield Weight(f"{theirs}.post_attention_layernorm.weight", f"{ours}.mlp_norm.weight")
        if config.experts:
            yield from _expert_weights(config, f"{theirs}.mlp", f"{ours}.mlp")
        else:
            yield from _swiglu_weights(f"{theirs}.mlp", f"{ours}.mlp")
    yield Weight("model.norm.weight", "norm.weight")
    if not config.tied_embeddings:
        yield Weight("lm_head.weight", "output.weight")


def _attention_weights(config: Qwen3NextConfig, theirs: str, ours: str) -> Iterator[Weight]:
    """Theirs has one projection for queries and gates: of each head the query's channels, then the gate's."""
    parts = [(f"{ours}.{name}.weight", config.head_size) for name in ("query", "gate")]
    yield from _interleaved(f"{theirs}.q_proj.weight", config.width, config.heads, parts)
    for their, our in (
        ("k_proj", "key"),
        ("v_proj", "value"),
        ("o_proj", "output"),
        ("q_norm", "query_norm"),
        ("k_norm", "key_norm"),
    ):
        yield Weight(f"{theirs}.{their}.weight", f"{ours}.{our}.weight")


def _memory_weights(config: Qwen3NextConfig, theirs: str, ours: str) -> Iterator[Weight]:
    """Theirs has one projection for queries, keys, values and gates, and one for betas and decays: of each key head its
    query and key, then the values (betas) and gates (decays) of the value heads that it serves."""
    heads, keys = config.key_heads, config.key_size
    served = config.value_heads // heads
    values = served * config.value_size
    parts = [(f"{ours}.qkv.weight", 2 * keys + values), (f"{ours}.gate.weight", values)]
    yield from _interleaved(f"{theirs}.in_proj_qkvz.weight", config.width, heads, parts)
    parts = [(f"{ours}.{name}.weight", served) for name in ("beta", "decay")]
    yield from _interleaved(f"{theirs}.in_proj_ba.weight", config.width, heads, parts)
    yield from _taps(config, f"{theirs}.conv1d.weight", f"{ours}.convolution.weight")
    for name in ("A_log", "dt_bias", "norm.weight"):
        yield Weight(f"{theirs}.{name}", f"{ours}.{name}")
    yield Weight(f"{theirs}.out_proj.weight", f"{ours}.output.weight")


def _interleaved(theirs: str, width: int, heads: int, parts: list[tuple[str, int]]) -> Iterator[Weight]:
    """Theirs holds all parts of the first head, then all of the second. A part is a weight of ours and its rows a
    head."""
    rows = sum(size for _, size in parts)
    at = 0
    for ours, size in parts:
        yield Weight(
            theirs,
            ours,
            of_theirs=_rows_of_heads(0, heads, rows, slice(at, at + size)),
            of_ours=_rows_of_heads(0, heads, size, slice(None)),
            shape=(heads * rows, width),
        )
        at += size


def _taps(config: Qwen3NextConfig, theirs: str, ours: str) -> Iterator[Weight]:
    """Theirs holds the taps of all queries, then those of all keys, then of all values; ours lie by key head."""
    heads, keys = config.key_heads, config.key_size
    sizes = [keys, keys, config.value_heads // heads * config.value_size]  # rows a key head
    for i, size in enumerate(sizes):
        before = sum(sizes[:i])
        yield Weight(
            theirs,
            ours,
            of_theirs=_rows_of_heads(heads * before, heads, size, slice(None)),
            of_ours=_with_channel(_rows_of_heads(0, heads, sum(sizes), slice(before, before + size))),
            shape=(heads * sum(sizes), 1, config.taps),
        )


def _with_channel(view: View) -> View:
    """A view of ours in the shape of a convolution over one channel."""
    return lambda t: view(t)[:, :, None]


def _rows_of_heads(begin: int, heads: int, rows: int, part: slice) -> View:
    """The view of a part of each head, where heads of so many rows lie one after another from `begin` on."""
    return lambda t: t[begin : begin + heads * rows].unflatten(0, (heads, rows))[:, part]


def _expert_weights(config: Qwen3NextConfig, theirs: str, ours: str) -> Iterator[Weight]:
    yield Weight(f"{theirs}.gate.weight", f"{ours}.router.weight")
    for e in range(config.experts):
        for name in ("gate", "up", "down"):
            yield Weight(f"{theirs}.experts.{e}.{name}_proj.weight", f"{ours}.experts.{name}", of_ours=itemgetter(e))
    yield from _swiglu_weights(f"{theirs}.shared_expert", f"{ours}.shared")
    yield Weight(f"{theirs}.shared_expert_gate.weight", f"{ours}.shared.share.weight")


def _swiglu_weights(theirs: str, ours: str) -> Iterator[Weight]:
    for name in ("gate", "up", "down"):
        yield Weight(f"{theirs}.{name}_proj.weight", f"{ours}.{name}.weight")


QWEN3_NEXT_HF = HuggingFace(
    model=Qwen3Next,
    architectures=("Qwen3NextForCausalLM",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=hf_weights,
    ignored=r"lm_head\.weight|.*\.rotary_emb\.inv_freq|mtp\..*",  # the multi-token prediction is not built here
)
