"""How a family says what Hugging Face calls its parts: fields of config.json, and names of tensors.

A format is one `HuggingFace(...)`: the names of its architectures, its config to theirs and back, and which tensor of
theirs is which of ours. `LLAMA3_HF` in `llama3.py` is the example to follow.

Most fields and most tensors are renamed and nothing else, by tables: `read_fields`, `write_fields`, `rename`.

    Weight("model.norm.weight", "norm.weight")

Where tensors are cut or arranged differently, the two sides are views that hold the same numbers. A view must share its
memory (index, transpose, unflatten; never reshape or cat), because loading copies theirs into ours through it, and
saving ours into theirs:

    # one tensor an expert [F, W]; ours holds all of them in one [E, F, W]
    Weight(f"{theirs}.experts.{e}.gate_proj.weight", f"{ours}.experts.gate", of_ours=operator.itemgetter(e))

    # theirs holds gate and up in one [E, W, 2F], channel by channel; two of ours [E, W, F]
    Weight(f"{theirs}.gate_up_proj", f"{ours}.gate", of_theirs=lambda t: t[..., ::2], shape=(E, W, 2 * F))
    Weight(f"{theirs}.gate_up_proj", f"{ours}.up", of_theirs=lambda t: t[..., 1::2], shape=(E, W, 2 * F))

    # theirs turns channel 2i with 2i + 1, ours i with i + D/2
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

View = Callable[[Tensor], Tensor]


def whole(tensor: Tensor) -> Tensor:
    """The view that shows all of a tensor, as it is."""
    return tensor


@dataclass(frozen=True)
class Weight:
    """`of_theirs(theirs)` and `of_ours(ours)` hold the same numbers in the same shape.

    Several weights may name the same tensor of theirs, or of ours; together they cover it.
    """

    theirs: str
    """Its name in the safetensors files."""
    ours: str
    """Its name in the model's state_dict (a parameter or a persistent buffer)."""
    of_theirs: View = whole
    of_ours: View = whole
    shape: tuple[int, ...] | None = None
    """Shape of all of theirs; needed where `of_theirs` is given, else it is that of `of_ours(ours)`."""


@dataclass(frozen=True, kw_only=True)
class HuggingFace:
    """How the models of one family are written in a Hugging Face directory.

    What a model's state_dict does not hold, it must not need: it is built without memory, and then given memory that
    only the weights fill.
    """

    architectures: tuple[str, ...]
    """The names that config.json gives such models in "architectures"."""
    config_from_hf: Callable[[dict[str, Any]], dict[str, Any]]
    """The fields of our config, from those of config.json. ValueError for what our model does not do: see `expect`."""
    config_to_hf: Callable[[Any], dict[str, Any]]
    """The fields of config.json, with "architectures" and "model_type"; of those without meaning to our model only what
    their class could not do without (their defaults stand for the rest)."""
    weights: Callable[[Any], Iterable[Weight]]
    """All tensors of the model with our config. A model with tied embeddings has no lm_head.weight."""
    ignored: str = r"lm_head\.weight|.*\.rotary_emb\.inv_freq"
    """Tensors that a file may hold though `weights` does not name them (a regular expression for the whole name)."""


DECODER = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}
"""Fields of our config, and what config.json calls them: those of every decoder."""
HEADS = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
"""Those of grouped-query attention."""


def read_fields(hf: Mapping[str, Any], names: Mapping[str, str], **missing: Any) -> dict[str, Any]:
    """Fields of our config, by {ours: theirs}; those that config.json may lack have the values of `missing` then.

    Raises:
        KeyError: for a field that it must have.
    """
    return {
        ours: hf[theirs] if theirs in hf or ours not in missing else missing[ours] for ours, theirs in names.items()
    }


def write_fields(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Fields of config.json, by {ours: theirs}."""
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}


def expect(hf: Mapping[str, Any], **values: Any) -> None:
    """Refuse a config.json that asks for what our model does not do. A field that is missing is as expected.

    Errors: ValueError naming the field, its value and the only one our model knows.
    """
    for name, value in values.items():
        if hf.get(name, value) != value:
            raise ValueError(
                f"config.json has {name} = {hf[name]!r}, which {hf['architectures'][0]} does not support here; "
                f"expected {value!r}"
            )


NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
"""Modules of a layer, and what we call them: its norms."""
ATTENTION = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
"""Those of grouped-query attention."""
MLP = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
"""Those of a feed-forward layer, or of an expert."""


def rename(theirs: str, ours: str, names: Mapping[str, str], *kinds: str) -> Iterator[Weight]:
    """The weights of the modules {theirs: ours} of two modules, or their tensors of several kinds."""
    for their_name, name in names.items():
        for kind in kinds or ("weight",):
            yield Weight(f"{theirs}.{their_name}.{kind}", f"{ours}.{name}.{kind}")


def rename_experts(theirs: str, ours: str, experts: int) -> Iterator[Weight]:
    """Theirs has one tensor an expert, ours all experts in one."""
    for e in range(experts):
        for their_name, name in MLP.items():
            yield Weight(f"{theirs}.{e}.{their_name}.weight", f"{ours}.{name}", of_ours=itemgetter(e))


def rename_fused_experts(config: Any, theirs: str, ours: str, halves: Mapping[str, View]) -> Iterator[Weight]:
    """Theirs has all experts in one too, but input dims first, and gate and up in one, of which `halves` are views."""
    shape = (config.num_experts, config.hidden_size, 2 * config.intermediate_size)
    for name, half in halves.items():
        yield Weight(f"{theirs}.gate_up_proj", f"{ours}.{name}", half, lambda t: t.mT, shape)
    yield Weight(f"{theirs}.down_proj", f"{ours}.down", of_ours=lambda t: t.mT)


def rename_rope_weight(
    theirs: str, ours: str, heads: int, shape: tuple[int, int], *, plain: int = 0
) -> Iterator[Weight]:
    """A weight [heads * D, W] for RoPE: theirs turns channel 2i of a head with 2i + 1, ours i with i + half of them.

    The first `plain` channels of each head are not turned, and stay where they are.
    """

    def still(t: Tensor) -> Tensor:
        return t.unflatten(0, (heads, -1))[:, :plain]

    def turned(t: Tensor) -> Tensor:
        return t.unflatten(0, (heads, -1))[:, plain:]

    if plain:
        yield Weight(theirs, ours, still, still, shape)
    yield Weight(
        theirs,
        ours,
        lambda t: turned(t).unflatten(1, (-1, 2)).transpose(1, 2),
        lambda t: turned(t).unflatten(1, (2, -1)),
        shape,
    )


def decoder_weights(config: Any, layer: Callable[[Any, int, str, str], Iterable[Weight]]) -> Iterator[Weight]:
    """Embedding, layers, norm and head. `layer(config, index, theirs, ours)` gives the weights of one layer."""
    yield Weight("model.embed_tokens.weight", "embedding.weight")
    for index in range(config.num_layers):
        yield from layer(config, index, f"model.layers.{index}", f"layers.{index}")
    yield Weight("model.norm.weight", "norm.weight")
    if not config.tied_embeddings:
        yield Weight("lm_head.weight", "output.weight")


class Group(NamedTuple):
    """One tensor of theirs."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    weights: list[Weight]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def group_weights(model: nn.Module, weights: Iterable[Weight], dtype: torch.dtype | None = None) -> dict[str, Group]:
    """The tensors of theirs that hold the model, in its order.

    dtype  what parameters are written in, without it their own; buffers always keep theirs
    """
    state, parameters = model.state_dict(), dict(model.named_parameters())
    groups: dict[str, Group] = {}
    left = {name: tensor.numel() for name, tensor in state.items()}
    for weight in weights:
        tensor = state[weight.ours]
        part = weight.of_ours(tensor)
        left[weight.ours] -= part.numel()
        if weight.theirs not in groups:
            written = dtype if dtype is not None and weight.ours in parameters else tensor.dtype
            groups[weight.theirs] = Group(weight.shape or tuple(part.shape), written, [])
        groups[weight.theirs].weights.append(weight)
    assert not any(left.values()), f"the family's weights do not cover {[name for name, n in left.items() if n]}"
    return groups
