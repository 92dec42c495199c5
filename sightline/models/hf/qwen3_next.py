"""Qwen3-Next in Hugging Face's form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sightline.models.hf.format import (
    DECODER,
    HEADS,
    MLP,
    HuggingFace,
    View,
    Weight,
    decoder_weights,
    expect,
    read_fields,
    rename,
    rename_experts,
    write_fields,
)
from sightline.models.hf.rope import read_rope

FIELDS = {
    **DECODER,
    **HEADS,
    "linear_num_key_heads": "linear_num_key_heads",
    "linear_num_value_heads": "linear_num_value_heads",
    "linear_key_head_dim": "linear_key_head_dim",
    "linear_value_head_dim": "linear_value_head_dim",
    "linear_conv_kernel_dim": "linear_conv_kernel_dim",
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "moe_intermediate_size": "moe_intermediate_size",
    "shared_expert_intermediate_size": "shared_expert_intermediate_size",
    "intermediate_size": "intermediate_size",
    "aux_loss_coef": "router_aux_loss_coef",
}


def config_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    expect(hf, hidden_act="silu", attention_bias=False, decoder_sparse_step=1, norm_topk_prob=True)
    expect({**hf, "mlp_only_layers": hf.get("mlp_only_layers") or []}, mlp_only_layers=[])
    rope = read_rope(hf)
    fields = read_fields(hf, FIELDS, aux_loss_coef=0.001, norm_eps=1e-6, tied_embeddings=False)
    every = _attention_every(hf)
    expect(hf, layer_types=_layer_types(fields["num_layers"], every))
    return {
        **fields,
        "full_attention_interval": every,
        "partial_rotary_factor": rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor", 0.25),
        "rope_theta": rope["rope_theta"],
    }


def _attention_every(hf: dict[str, Any]) -> int:
    """Files say it as an interval, or name the kind of every layer; a model without attention has it in none."""
    kinds = hf.get("layer_types")
    if kinds is None:
        return hf.get("full_attention_interval", 4)
    return kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1


def _layer_types(layers: int, every: int) -> list[str]:
    return ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]


def config_to_hf(config: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        **write_fields(config, FIELDS),
        "layer_types": _layer_types(config.num_layers, config.full_attention_interval),
        "partial_rotary_factor": config.partial_rotary_factor,
        "rope_theta": config.rope_theta,
    }


def _layer_weights(config: Any, index: int, theirs: str, ours: str) -> Iterator[Weight]:
    yield from rename(theirs, ours, {"input_layernorm": "mixer_norm", "post_attention_layernorm": "mlp_norm"})
    if config.has_attention(index):
        yield from _attention_weights(config, f"{theirs}.self_attn", f"{ours}.mixer")
    else:
        yield from _memory_weights(config, f"{theirs}.linear_attn", f"{ours}.mixer")
    theirs, ours = f"{theirs}.mlp", f"{ours}.mlp"
    if not config.num_experts:
        yield from rename(theirs, ours, MLP)
        return
    yield Weight(f"{theirs}.gate.weight", f"{ours}.router.weight")
    yield from rename_experts(f"{theirs}.experts", f"{ours}.experts", config.num_experts)
    yield from rename(f"{theirs}.shared_expert", f"{ours}.shared", MLP)
    yield Weight(f"{theirs}.shared_expert_gate.weight", f"{ours}.shared.share.weight")


def _attention_weights(config: Any, theirs: str, ours: str) -> Iterator[Weight]:
    """Theirs has one projection for queries and gates: of each head the query's channels, then the gate's."""
    parts = [(f"{ours}.{name}.weight", config.head_dim) for name in ("query", "gate")]
    yield from _interleaved(f"{theirs}.q_proj.weight", config.hidden_size, config.num_heads, parts)
    norms = {"q_norm": "query_norm", "k_norm": "key_norm"}
    yield from rename(theirs, ours, {"k_proj": "key", "v_proj": "value", "o_proj": "output", **norms})


def _memory_weights(config: Any, theirs: str, ours: str) -> Iterator[Weight]:
    """Theirs has one projection for queries, keys, values and gates, and one for betas and decays: of each key head its
    query and key, then the values (betas) and gates (decays) of the value heads that it serves."""
    heads, keys = config.linear_num_key_heads, config.linear_key_head_dim
    served = config.linear_num_value_heads // heads
    values = served * config.linear_value_head_dim
    parts = [(f"{ours}.qkv.weight", 2 * keys + values), (f"{ours}.gate.weight", values)]
    yield from _interleaved(f"{theirs}.in_proj_qkvz.weight", config.hidden_size, heads, parts)
    parts = [(f"{ours}.{name}.weight", served) for name in ("beta", "decay")]
    yield from _interleaved(f"{theirs}.in_proj_ba.weight", config.hidden_size, heads, parts)
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


def _taps(config: Any, theirs: str, ours: str) -> Iterator[Weight]:
    """Theirs holds the taps of all queries, then those of all keys, then of all values; ours lie by key head."""
    heads, keys = config.linear_num_key_heads, config.linear_key_head_dim
    sizes = [keys, keys, config.linear_num_value_heads // heads * config.linear_value_head_dim]  # rows a key head
    for i, size in enumerate(sizes):
        before = sum(sizes[:i])
        yield Weight(
            theirs,
            ours,
            of_theirs=_rows_of_heads(heads * before, heads, size, slice(None)),
            of_ours=_with_channel(_rows_of_heads(0, heads, sum(sizes), slice(before, before + size))),
            shape=(heads * sum(sizes), 1, config.linear_conv_kernel_dim),
        )


def _with_channel(view: View) -> View:
    """A view of ours in the shape of a convolution over one channel."""
    return lambda t: view(t)[:, :, None]


def _rows_of_heads(begin: int, heads: int, rows: int, part: slice) -> View:
    """The view of a part of each head, where heads of so many rows lie one after another from `begin` on."""
    return lambda t: t[begin : begin + heads * rows].unflatten(0, (heads, rows))[:, part]


QWEN3_NEXT_HF = HuggingFace(
    architectures=("Qwen3NextForCausalLM",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=lambda config: decoder_weights(config, _layer_weights),
    ignored=r"lm_head\.weight|.*\.rotary_emb\.inv_freq|mtp\..*",  # the multi-token prediction is not built here
)
