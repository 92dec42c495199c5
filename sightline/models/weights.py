"""Hugging Face weights: what a family says of its own, and how tensors come in and go out.

A family's file ends with one `HuggingFace(...)`: the names of its architectures, its config to theirs and back, and
which tensor of theirs is which of ours. `LLAMA3_HF` in `sightline/models/llama3.py` is the example to follow. Then its
name is added to `FORMATS` in `sightline/models/pretrained.py`, where `load_pretrained` and `save_pretrained` are.

Most tensors are renamed and nothing else:

    Weight("model.norm.weight", "norm.weight")

Where they are cut or arranged differently, the two sides are views that hold the same numbers. A view must share its
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

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sightline.layers import Llama3RopeScaling, YarnScaling
from sightline.models.drawing import part_of
from sightline.torch_private import is_dtensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

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
    """How the models of one family are written in a Hugging Face directory."""

    model: Callable[..., Any]
    """The class of the model, built as model(config, attention_backend=...); what its state_dict does not hold, it must
    not need: it is built without memory, and then given memory that only the weights fill."""
    architectures: tuple[str, ...]
    """The names that config.json gives such models in "architectures"."""
    config_from_hf: Callable[[dict[str, Any]], Any]
    """From the fields of config.json to our config. ValueError for what our model does not do: see `expect`."""
    config_to_hf: Callable[[Any], dict[str, Any]]
    """And back, with "architectures" and "model_type"; of fields without meaning to our model only what their class
    could not do without (their defaults stand for the rest)."""
    weights: Callable[[Any], Iterable[Weight]]
    """All tensors of the model with our config. A model with tied embeddings has no lm_head.weight."""
    ignored: str = r"lm_head\.weight|.*\.rotary_emb\.inv_freq"
    """Tensors that a file may hold though `weights` does not name them (a regular expression for the whole name)."""


def expect(hf: dict[str, Any], **values: Any) -> None:
    """Refuse a config.json that asks for what our model does not do. A field that is missing is as expected.

    Errors: ValueError naming the field, its value and the only one our model knows.
    """
    for name, value in values.items():
        if hf.get(name, value) != value:
            raise ValueError(
                f"config.json has {name} = {hf[name]!r}, which {hf['architectures'][0]} does not support here; "
                f"expected {value!r}"
            )


def read_rope(hf: dict[str, Any], *known: str) -> dict[str, Any]:
    """What config.json says of RoPE: "rope_theta", "rope_type" ("default" for none) and what that type has.

    Older files have rope_theta and rope_scaling, newer ones rope_parameters with both.
    Errors: ValueError for a type that is neither "default" nor one of the known.
    """
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", *known):
        raise ValueError(
            f"config.json has the RoPE type {kind!r}, which {hf['architectures'][0]} does not support here; expected "
            f"{' or '.join(('default', *known))}"
        )
    context = {"original_max_position_embeddings": hf.get("max_position_embeddings")}
    return {"rope_theta": hf.get("rope_theta", 10_000.0), **context, **scaling, "rope_type": kind}


def read_scaling(rope: dict[str, Any]) -> Any:
    """The scaling in what `read_rope` gives: None, a Llama3RopeScaling or a YarnScaling."""
    if rope["rope_type"] == "llama3":
        return Llama3RopeScaling(
            factor=rope["factor"],
            low_freq_factor=rope["low_freq_factor"],
            high_freq_factor=rope["high_freq_factor"],
            original_context=rope["original_max_position_embeddings"],
        )
    if rope["rope_type"] == "yarn":
        return _read_yarn(rope)
    return None


def _read_yarn(rope: dict[str, Any]) -> YarnScaling:
    both = bool(rope.get("mscale") and rope.get("mscale_all_dim"))  # transformers heeds them together or not at all
    scaling = YarnScaling(
        factor=rope["factor"],
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        original_context=rope["original_max_position_embeddings"],
        truncate=rope.get("truncate", True),
        mscale=rope["mscale"] if both else 1.0,
        mscale_all_dim=rope["mscale_all_dim"] if both else 0.0,
    )
    stated = rope.get("attention_factor")
    if stated is not None and abs(stated - scaling.rotation_factor) > 1e-6:
        raise ValueError(
            f"config.json has the YaRN attention_factor {stated}; expected {scaling.rotation_factor}, which its factor "
            "and its mscales give"
        )
    return scaling


def write_rope(theta: float, scaling: Llama3RopeScaling | YarnScaling | None) -> dict[str, Any]:
    """Both for a config.json, in the older form: every version of transformers reads it."""
    written: dict[str, Any] | None = None
    if isinstance(scaling, Llama3RopeScaling):
        written = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        }
    if isinstance(scaling, YarnScaling):
        written = {
            "rope_type": "yarn",
            "factor": scaling.factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "original_max_position_embeddings": scaling.original_context,
            "truncate": scaling.truncate,
        }
        if scaling.mscale_all_dim:
            written |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return {"rope_theta": theta, "rope_scaling": written}


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


def read_weights(model: Any, directory: Path, family: HuggingFace, state: Mapping[str, Tensor] | None = None) -> None:
    """Fill the model from the safetensors files of a directory, tensor by tensor; nothing is changed before all fit.

    state  the tensors to fill, by their names in the model: what one of many processes holds of it, whole or as
           DTensors; without it, the model's own. The files are mapped, so of a tensor that is only renamed a process
           reads no more than its part.

    Errors: ValueError naming the first tensor that is missing, unexpected or of another shape, or the file that cannot
    be read.
    """
    weights = list(family.weights(model.config))
    groups = group_weights(model, weights)
    files = _find_files(directory)
    _check_names(groups, files, family.ignored, directory)
    _check_shapes(groups, files)
    of: dict[str, list[Weight]] = {}
    for weight in weights:
        of.setdefault(weight.ours, []).append(weight)
    with torch.no_grad():
        for name, tensor in (model.state_dict() if state is None else state).items():
            _fill(tensor, of[name], files)


def _fill(ours: Tensor, weights: list[Weight], files: dict[str, Path]) -> None:
    """One of our tensors from all of theirs that hold it."""
    if is_dtensor(ours):
        if [weight.of_ours for weight in weights] == [whole]:
            source = _view(weights[0], files)
        else:
            source = torch.empty(ours.shape, dtype=ours.dtype, device="cpu")
            _fill(source, weights, files)
        ours.to_local().copy_(part_of(source, ours))
        return
    for weight in weights:
        weight.of_ours(ours).copy_(_view(weight, files))


def _view(weight: Weight, files: dict[str, Path]) -> Tensor:
    file = files[weight.theirs]
    with _open(file) as opened:  # anew for each: a file that stays open keeps in memory all that was read of it
        return weight.of_theirs(opened.get_tensor(weight.theirs))


def holds_weights(directory: Path) -> bool:
    """Whether a directory has weights in Hugging Face's form."""
    return any((directory / name).is_file() for name in (SINGLE, INDEX))


def _find_files(directory: Path) -> dict[str, Path]:
    """Where each tensor lies."""
    index, single = directory / INDEX, directory / SINGLE
    if index.is_file():
        try:
            named = {name: directory / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged ({type(error).__name__}: {error}); fetch it again") from error
        absent = sorted({file for file in named.values() if not file.is_file()})
        if absent:
            raise ValueError(f"{directory} is not whole: {INDEX} names {absent[0].name}, which is not there")
        return named
    if not single.is_file():
        raise ValueError(
            f"{directory} holds no weights: expected {SINGLE}, or {INDEX} and the files it names. Weights in the older "
            "pytorch_model.bin are not read, because such a file may run any code: save them anew as safetensors"
        )
    with _open(single) as opened:
        return dict.fromkeys(opened.keys(), single)


def _by_file(files: dict[str, Path]) -> dict[Path, list[str]]:
    gathered: dict[Path, list[str]] = {}
    for name, file in files.items():
        gathered.setdefault(file, []).append(name)
    return gathered


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read ({error}); it is cut short or no safetensors file") from error


def _check_names(groups: dict[str, Group], files: dict[str, Path], ignored: str, directory: Path) -> None:
    missing = [name for name in groups if name not in files]
    unexpected = [name for name in files if name not in groups and not re.fullmatch(ignored, name)]
    if missing or unexpected:
        told = [
            f"{what} {names[0]}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
            for what, names in (("without", missing), ("with the unexpected", unexpected))
            if names
        ]
        raise ValueError(
            f"the weights in {directory} come {' and '.join(told)}; expected those of the model that its config.json "
            "describes"
        )


def _check_shapes(groups: dict[str, Group], files: dict[str, Path]) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    for file, names in _by_file(files).items():
        with _open(file) as opened:
            absent = sorted(set(names) - set(opened.keys()))
            if absent:
                raise ValueError(f"{file} has no tensor {absent[0]}, though {INDEX} says so; fetch both again")
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    for name, group in groups.items():
        if shapes[name] != group.shape:
            raise ValueError(
                f"{name} in {files[name]} has the shape {shapes[name]}; expected {group.shape} from the config's sizes"
            )


def write_weights(
    model: nn.Module,
    directory: Path,
    weights: Iterable[Weight],
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    read: Callable[[list[str]], Mapping[str, Tensor]],
    rank: int,
    world: int,
) -> None:
    """Write the model's tensors into `directory`, one file after another, every `world`-th of them; rank 0 the index.

    model  says which tensors there are; it needs no memory for them
    read   gives tensors of the model, whole, by their names
    """
    groups = group_weights(model, weights, dtype)
    shards = list(_shards(groups, max_shard_bytes))
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) > 1 and rank == 0:
        index = {
            "metadata": {"total_size": sum(group.bytes for group in groups.values())},
            "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for name, shard in list(zip(names, shards, strict=True))[rank::world]:
        state = read(sorted({weight.ours for tensor in shard for weight in groups[tensor].weights}))
        tensors = {tensor: _give(state, groups[tensor]) for tensor in shard}
        save_file(tensors, directory / name, metadata={"format": "pt"})


def _give(state: Mapping[str, Tensor], group: Group) -> Tensor:
    tensor = torch.empty(group.shape, dtype=group.dtype, device="cpu")
    for weight in group.weights:
        weight.of_theirs(tensor).copy_(weight.of_ours(state[weight.ours]))
    return tensor


def _shards(groups: dict[str, Group], max_bytes: int) -> Iterator[list[str]]:
    """Names of the tensors of each file: as many as fit, at least one."""
    shard: list[str] = []
    size = 0
    for name, group in groups.items():
        if shard and size + group.bytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += group.bytes
    yield shard
