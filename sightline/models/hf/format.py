"""Building blocks of a family's Hugging Face format: names of config.json fields and of tensors.

A format is one `HuggingFace(...)`: architecture names, config conversion in both directions, and the correspondence
between tensors. "Theirs" are the fields and tensors of transformers, "ours" those of this package. `LLAMA3_HF` in
`llama3.py` is the example to follow.

Most fields and tensors are only renamed, by tables: `read_fields`, `write_fields`, `rename`.

    Weight("model.norm.weight", "norm.weight")

If tensors are split or laid out differently, each side is a view, and both views hold the same numbers. A view must
share memory with its tensor (index, transpose, unflatten; never reshape or cat), because loading copies theirs into
ours through the views, and saving ours into theirs:

    # theirs: one tensor per expert [F, W]; ours: one tensor of all experts [E, F, W]
    Weight(f"{theirs}.experts.{e}.gate_proj.weight", f"{ours}.experts.gate", of_ours=operator.itemgetter(e))

    # theirs: gate and up interleaved by channel in one tensor [E, W, 2F]; ours: two tensors [E, W, F]
    Weight(f"{theirs}.gate_up_proj", f"{ours}.gate", of_theirs=lambda t: t[..., ::2], shape=(E, W, 2 * F))
    Weight(f"{theirs}.gate_up_proj", f"{ours}.up", of_theirs=lambda t: t[..., 1::2], shape=(E, W, 2 * F))

    # RoPE pairs channel 2i with 2i + 1 in theirs, i with i + D/2 in ours
    Weight(
        f"{theirs}.q_proj.weight",
        f"{ours}.query.weight",
        of_theirs=lambda t: t.unflatten(0, (H, D // 2, 2)).transpose(1, 2),
        of_ours=lambda t: t.unflatten(0, (H, 2, D // 2)),
        shape=(H * D, W),
    )
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sightline.config.checks import check_limit, check_value

View = Callable[[Tensor], Tensor]


def identity(tensor: Tensor) -> Tensor:
    """Return the tensor unchanged: the default view."""
    return tensor


@dataclass(frozen=True)
class Weight:
    """Correspondence of two tensors: the views `of_theirs(theirs)` and `of_ours(ours)` have equal shapes and values.

    Several weights may refer to the same tensor of theirs, or of ours; together they must cover it.
    """

    theirs: str
    """Name of the tensor in the safetensors files."""
    ours: str
    """Name of the parameter or persistent buffer in the model's state dict."""
    of_theirs: View = identity
    of_ours: View = identity
    shape: tuple[int, ...] | None = None
    """Shape of the full tensor of theirs; required with `of_theirs`, otherwise the shape of `of_ours(ours)`."""


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """Hugging Face format of a model family.

    A model must not depend on tensors outside its state dict, such as non-persistent buffers: loading builds it on the
    meta device and fills only the state dict.
    """

    architectures: tuple[str, ...]
    """Names of the family's models in "architectures" of config.json."""
    config_from_hf: Callable[[dict[str, Any]], dict[str, Any]]
    """Converts config.json to fields of our config; ValueError for unsupported features, see `expect`."""
    config_to_hf: Callable[[Any], dict[str, Any]]
    """Converts our config to fields of config.json, with "architectures" and "model_type". Fields that our model does
    not use may be omitted if the defaults of transformers are right."""
    weights: Callable[[Any], Iterable[Weight]]
    """Returns the weights of a model with our config, without lm_head.weight if its embeddings are tied."""
    ignored: str = r"lm_head\.weight|.*\.rotary_emb\.inv_freq"
    """Regular expression for the full names of tensors that the files may contain and that are not loaded."""


DECODER = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}
"""{field of our config: field of config.json} of every decoder."""
HEADS = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
"""{field of our config: field of config.json} of grouped-query attention."""


def read_fields(hf: Mapping[str, Any], names: Mapping[str, str], **missing: Any) -> dict[str, Any]:
    """Return fields of our config, by a table {ours: theirs}. `missing` has the values of fields that are optional.

    Sizes are compared with their limits here already, because a family may build a list of that length from them.

    Raises:
        KeyError: if config.json lacks a required field.
        ValueError: if a size is absurdly large.
    """
    fields = {
        ours: hf[theirs] if theirs in hf or ours not in missing else missing[ours] for ours, theirs in names.items()
    }
    for ours, value in fields.items():
        check_limit(ours, value, f"{names[ours]} in config.json")
    return fields


def read_field(hf: Mapping[str, Any], name: str, kind: Any, default: Any = None) -> Any:
    """Return one field of config.json, or `default` if it is missing or null.

    Raises:
        ValueError: if it has another type than `kind`.
    """
    value = default if hf.get(name) is None else hf[name]
    if value is not default:
        check_value(kind, value, f"{name} in config.json")
    return value


def write_fields(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Return fields of config.json, by a table {ours: theirs}."""
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}


def expect(hf: Mapping[str, Any], **values: Any) -> None:
    """Check that fields of config.json have the only values that our model supports. A field may be missing.

    Raises:
        ValueError: if a field has another value; the message gives both values.
    """
    for name, value in values.items():
        if hf.get(name, value) != value:
            raise ValueError(
                f"config.json has {name} = {hf[name]!r}, which is not supported for {hf['architectures'][0]}; "
                f"expected {value!r}"
            )


NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
"""{their module: ours} of a layer's norms."""
ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
"""{their module: ours} of grouped-query attention."""
MLP = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
"""{their module: ours} of a feed-forward layer or an expert."""


def rename(theirs: str, ours: str, names: Mapping[str, str], *kinds: str) -> Iterator[Weight]:
    """Yield the weights of the submodules {their name: our name} of two modules; `kinds` are tensors such as "bias"."""
    for their_name, name in names.items():
        for kind in kinds or ("weight",):
            yield Weight(f"{theirs}.{their_name}.{kind}", f"{ours}.{name}.{kind}")


def rename_experts(theirs: str, ours: str, experts: int) -> Iterator[Weight]:
    """Yield the weights of experts that are one tensor per expert in theirs, and one tensor of all experts in ours."""
    for e in range(experts):
        for their_name, name in MLP.items():
            yield Weight(f"{theirs}.{e}.{their_name}.weight", f"{ours}.{name}", of_ours=itemgetter(e))


def rename_fused_experts(config: Any, theirs: str, ours: str, halves: Mapping[str, View]) -> Iterator[Weight]:
    """Yield the weights of experts that are stored with the input dim first, and gate and up in one tensor.

    halves  {our name: view of their gate_up_proj}
    """
    shape = (config.num_experts, config.hidden_size, 2 * config.intermediate_size)
    for name, half in halves.items():
        yield Weight(f"{theirs}.gate_up_proj", f"{ours}.{name}", half, lambda t: t.mT, shape)
    yield Weight(f"{theirs}.down_proj", f"{ours}.down", of_ours=lambda t: t.mT)


def rename_rope_weight(
    theirs: str, ours: str, heads: int, shape: tuple[int, int], *, nope_dim: int = 0
) -> Iterator[Weight]:
    """Yield a weight [heads * D, W] whose output RoPE rotates: theirs pairs channel 2i of a head with 2i + 1, ours i
    with i + D/2. The first `nope_dim` channels of each head are not rotated, and keep their order."""

    def nope(t: Tensor) -> Tensor:
        return t.unflatten(0, (heads, -1))[:, :nope_dim]

    def rotated(t: Tensor) -> Tensor:
        return t.unflatten(0, (heads, -1))[:, nope_dim:]

    if nope_dim:
        yield Weight(theirs, ours, nope, nope, shape)
    yield Weight(
        theirs,
        ours,
        lambda t: rotated(t).unflatten(1, (-1, 2)).transpose(1, 2),
        lambda t: rotated(t).unflatten(1, (2, -1)),
        shape,
    )


def decoder_weights(config: Any, layer: Callable[[Any, int, str, str], Iterable[Weight]]) -> Iterator[Weight]:
    """Yield the weights of a decoder. `layer(config, index, theirs, ours)` returns those of one layer."""
    yield Weight("model.embed_tokens.weight", "embedding.weight")
    for index in range(config.num_layers):
        yield from layer(config, index, f"model.layers.{index}", f"layers.{index}")
    yield Weight("model.norm.weight", "norm.weight")
    if not config.tied_embeddings:
        yield Weight("lm_head.weight", "output.weight")


class Group(NamedTuple):
    """One tensor of theirs, and the weights that cover it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    weights: list[Weight]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def group_weights(model: nn.Module, weights: Iterable[Weight], dtype: torch.dtype | None = None) -> dict[str, Group]:
    """Return {name: Group} of all tensors of theirs, in the order of `weights`.

    dtype  dtype of parameters in theirs; default: as in the model. Buffers always keep their dtype
    """
    state, parameters = model.state_dict(), dict(model.named_parameters())
    groups: dict[str, Group] = {}
    uncovered = {name: tensor.numel() for name, tensor in state.items()}
    for weight in weights:
        tensor = state[weight.ours]
        view = weight.of_ours(tensor)
        uncovered[weight.ours] -= view.numel()
        if weight.theirs not in groups:
            saved_dtype = dtype if dtype is not None and weight.ours in parameters else tensor.dtype
            groups[weight.theirs] = Group(weight.shape or tuple(view.shape), saved_dtype, [])
        groups[weight.theirs].weights.append(weight)
    missing = [name for name, count in uncovered.items() if count]
    assert not missing, f"the family's weights do not cover {missing}"
    return groups
