"""Hugging Face format of Qwen3-Next."""

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
    read_field,
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
    interval = _full_attention_interval(hf)
    if hf.get("layer_types") is not None:
        expect(hf, layer_types=_layer_types(read_field(hf, "num_hidden_layers", int, 0), interval))
    return {
        **fields,
        "full_attention_interval": interval,
        "partial_rotary_factor": rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor", 0.25),
        "rope_theta": rope["rope_theta"],
    }


def _full_attention_interval(hf: dict[str, Any]) -> int:
    """Return the interval of attention layers, which config.json gives as such or by the type of every layer."""
    types = read_field(hf, "layer_types", list)
    if types is None:
        return read_field(hf, "full_attention_interval", int, 4)
    return types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1


def _layer_types(num_layers: int, interval: int) -> list[str]:
    return ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(num_layers)]


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
        yield from _delta_net_weights(config, f"{theirs}.linear_attn", f"{ours}.mixer")
    theirs, ours = f"{theirs}.mlp", f"{ours}.mlp"
    if not config.num_experts:
        yield from rename(theirs, ours, MLP)
        return
    yield Weight(f"{theirs}.gate.weight", f"{ours}.router.weight")
    yield from rename_experts(f"{theirs}.experts", f"{ours}.experts", config.num_experts)
    yield from rename(f"{theirs}.shared_expert", f"{ours}.shared", MLP)
    yield Weight(f"{theirs}.shared_expert_gate.weight", f"{ours}.shared.share.weight")


def _attention_weights(config: Any, theirs: str, ours: str) -> Iterator[Weight]:
    """Theirs has one projection for queries and gates: for each head, the channels of its query, then of its gate."""
    parts = [(f"{ours}.{name}.weight", config.head_dim) for name in ("query", "gate")]
    yield from _interleaved(f"{theirs}.q_proj.weight", config.hidden_size, config.num_heads, parts)
    norms = {"q_norm": "query_norm", "k_norm": "key_norm"}
    yield from rename(theirs, ours, {"k_proj": "key", "v_proj": "value", "o_proj": "output", **norms})


def _delta_net_weights(config: Any, theirs: str, ours: str) -> Iterator[Weight]:
    """Theirs has one projection for queries, keys, values and gates, and one for betas and decays: for each key head,
    its query and key, then values (betas) and gates (decays) of its value heads."""
    heads, keys = config.linear_num_key_heads, config.linear_key_head_dim
    value_heads = config.linear_num_value_heads // heads  # per key head
    values = value_heads * config.linear_value_head_dim
    parts = [(f"{ours}.qkv.weight", 2 * keys + values), (f"{ours}.gate.weight", values)]
    yield from _interleaved(f"{theirs}.in_proj_qkvz.weight", config.hidden_size, heads, parts)
    parts = [(f"{ours}.{name}.weight", value_heads) for name in ("beta", "decay")]
    yield from _interleaved(f"{theirs}.in_proj_ba.weight", config.hidden_size, heads, parts)
    yield from _conv_weights(config, f"{theirs}.conv1d.weight", f"{ours}.convolution.weight")
    for name in ("A_log", "dt_bias", "norm.weight"):
        yield Weight(f"{theirs}.{name}", f"{ours}.{name}")
    yield Weight(f"{theirs}.out_proj.weight", f"{ours}.output.weight")


def _interleaved(theirs: str, hidden_size: int, heads: int, parts: list[tuple[str, int]]) -> Iterator[Weight]:
    """Theirs has all parts of the first head, then all of the second; a part is (weight of ours, its rows per head)."""
    rows = sum(size for _, size in parts)
    offset = 0
    for ours, size in parts:
        yield Weight(
            theirs,
            ours,
            of_theirs=_rows_of_heads(0, heads, rows, slice(offset, offset + size)),
            of_ours=_rows_of_heads(0, heads, size, slice(None)),
            shape=(heads * rows, hidden_size),
        )
        offset += size


def _conv_weights(config: Any, theirs: str, ours: str) -> Iterator[Weight]:
    """Theirs has the convolution kernels of all queries, then of all keys, then of all values; ours are by key head."""
    heads, keys = config.linear_num_key_heads, config.linear_key_head_dim
    sizes = [keys, keys, config.linear_num_value_heads // heads * config.linear_value_head_dim]  # rows per key head
    for i, size in enumerate(sizes):
        before = sum(sizes[:i])
        yield Weight(
            theirs,
            ours,
            of_theirs=_rows_of_heads(heads * before, heads, size, slice(None)),
            of_ours=_with_channel_dim(_rows_of_heads(0, heads, sum(sizes), slice(before, before + size))),
            shape=(heads * sum(sizes), 1, config.linear_conv_kernel_dim),
        )


def _with_channel_dim(view: View) -> View:
    """Return the view with the input channel dim of a depthwise convolution."""
    return lambda t: view(t)[:, :, None]


def _rows_of_heads(start: int, heads: int, rows: int, part: slice) -> View:
    """Return the view of `part` of the rows of each head; row `start` is the first of `heads` blocks of `rows` rows."""
    return lambda t: t[start : start + heads * rows].unflatten(0, (heads, rows))[:, part]


QWEN3_NEXT_HF = HuggingFace(
    architectures=("Qwen3NextForCausalLM",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=lambda config: decoder_weights(config, _layer_weights),
    ignored=r"lm_head\.weight|.*\.rotary_emb\.inv_freq|mtp\..*",  # the MTP module is not supported
)
