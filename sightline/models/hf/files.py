"""Read and write the safetensors files of a Hugging Face directory, tensor by tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sightline.models.hf.format import Group, Weight, group_weights, identity
from sightline.models.weight_init import local_shard
from sightline.paths import file_inside, read_json
from sightline.torch_private import is_dtensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 2**28
"""Largest index that is read: DeepSeek V3 has 91,991 tensors in 9 MB."""
MOST_MISSING = 1000
"""Missing tensors that are counted."""


def read_weights(
    model: nn.Module,
    directory: Path,
    weights: Iterable[Weight],
    *,
    ignored: str,
    state: Callable[[], Mapping[str, Tensor]] | None = None,
) -> None:
    """Load the safetensors files of a directory into a model. All names and shapes are checked before any copy.

    ignored  regular expression for the full names of tensors that the files may contain in addition
    state    returns {name in the model: tensor to fill}: the full or sharded (DTensor) tensors of this rank; default:
             the model's state dict. It is called after the checks, so it may allocate the tensors. The files are
             memory-mapped, so a rank reads only its shard of a tensor that is renamed without any other change.

    Raises:
        ValueError: as `check_weights`.
    """
    weights = list(weights)
    files = check_weights(model, directory, weights, ignored=ignored)
    weights_by_name: dict[str, list[Weight]] = {}
    for weight in weights:
        weights_by_name.setdefault(weight.ours, []).append(weight)
    with torch.no_grad():
        for name, tensor in (model.state_dict() if state is None else state()).items():
            _fill(tensor, weights_by_name[name], files)


def check_weights(model: nn.Module, directory: Path, weights: Iterable[Weight], *, ignored: str) -> dict[str, Path]:
    """Check that the safetensors files of a directory have the tensors of a model, and return {tensor name: file}.

    model  may be on the meta device

    Raises:
        ValueError: if a tensor is missing, unexpected or has another shape, or a file cannot be read; it is named.
    """
    weights = list(weights)
    files = check_names(directory, weights, ignored=ignored)
    _check_shapes(group_weights(model, weights), files)
    return files


def check_names(directory: Path, weights: Iterable[Weight], *, ignored: str) -> dict[str, Path]:
    """Check the names of the tensors only, and return {tensor name: file}. This needs no model.

    Ends after `MOST_MISSING` missing names: a config.json can ask for billions of tensors that are not there.

    Raises:
        ValueError: if a tensor is missing or unexpected.
    """
    files = _find_files(directory)
    wanted: dict[str, None] = {}
    missing: list[str] = []
    for weight in weights:
        if weight.theirs not in files and weight.theirs not in wanted:
            missing.append(weight.theirs)
        wanted[weight.theirs] = None
        if len(missing) == MOST_MISSING:
            break
    unexpected = [name for name in files if name not in wanted and not re.fullmatch(ignored, name)]
    if len(missing) == MOST_MISSING:
        unexpected = []
    if missing or unexpected:
        problems = [
            f"{problem} {names[0]}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")
            for problem, names in (("lack", missing), ("have the unexpected", unexpected))
            if names
        ]
        raise ValueError(
            f"the weights in {directory} {' and '.join(problems)}; expected the tensors of the model in its config.json"
        )
    return files


def _fill(ours: Tensor, weights: list[Weight], files: dict[str, Path]) -> None:
    """Fill one of our tensors from all tensors of theirs that contain a part of it."""
    if is_dtensor(ours):
        if [weight.of_ours for weight in weights] == [identity]:
            source = _view(weights[0], files)
        else:
            source = torch.empty(ours.shape, dtype=ours.dtype, device="cpu")
            _fill(source, weights, files)
        ours.to_local().copy_(local_shard(source, ours))
        return
    for weight in weights:
        weight.of_ours(ours).copy_(_view(weight, files))


def _view(weight: Weight, files: dict[str, Path]) -> Tensor:
    file = files[weight.theirs]
    # Reopened for each tensor: an open file keeps in memory all that was read from it.
    with open_safetensors(file) as opened:
        return weight.of_theirs(opened.get_tensor(weight.theirs))


def holds_weights(directory: Path) -> bool:
    """Whether a directory contains safetensors weights under their Hugging Face names."""
    return any((directory / name).is_file() for name in (SINGLE, INDEX))


def _find_files(directory: Path) -> dict[str, Path]:
    """Return {tensor name: file}."""
    if (directory / INDEX).is_file():
        return _read_index(directory)
    if not (directory / SINGLE).is_file():
        pickled = sorted(file.name for file in directory.glob("*.bin"))
        remedy = "download it again"
        if pickled:
            remedy = (
                f"{pickled[0]} is not read, because loading it can run arbitrary code. If you trust it, convert it: "
                "load it with from_pretrained of transformers, and write it with save_pretrained"
            )
        raise ValueError(f"{directory} contains no weights; expected {SINGLE}, or {INDEX} and its files: {remedy}")
    single = file_inside(directory, SINGLE)
    with open_safetensors(single) as opened:
        return dict.fromkeys(opened.keys(), single)


def _read_index(directory: Path) -> dict[str, Path]:
    """Return {tensor name: file} of the index of several files."""
    named = read_json(directory, INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise ValueError(
            f"{directory / INDEX} is damaged: expected the name of a file for each tensor in weight_map; download it "
            "again"
        )
    paths = {name: file_inside(directory, name) for name in sorted(set(named.values()))}
    absent = [name for name, path in paths.items() if not path.is_file()]
    if absent:
        raise ValueError(f"{directory} is incomplete: {INDEX} lists {absent[0]}, which does not exist; download it")
    return {tensor: paths[name] for tensor, name in named.items()}


def open_safetensors(file: Path) -> Any:
    """Open a safetensors file, to be used in a `with` statement.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        with file.open("rb") as opened:  # the library takes only paths in UTF-8, and maps the file when it opens it
            return safe_open(file if is_utf8(file) else f"/dev/fd/{opened.fileno()}", framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}); it is truncated or not a safetensors file") from error


def is_utf8(path: Path) -> bool:
    """Return whether a path can be written in UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_shapes(groups: dict[str, Group], files: dict[str, Path]) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    by_file: dict[Path, list[str]] = {}
    for name, file in files.items():
        by_file.setdefault(file, []).append(name)
    for file, names in by_file.items():
        with open_safetensors(file) as opened:
            absent = sorted(set(names) - set(opened.keys()))
            if absent:
                raise ValueError(f"{file} has no tensor {absent[0]}, but {INDEX} lists it; download both again")
            shapes |= {name: tuple(opened.get_slice(name).get_shape()) for name in names}
    for name, group in groups.items():
        if shapes[name] != group.shape:
            raise ValueError(
                f"{name} in {files[name]} has shape {shapes[name]}; expected {group.shape} according to config.json"
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
    """Write this rank's files, every `world`-th of all safetensors files, to a directory. Rank 0 also writes the index.

    model  defines names, shapes and dtypes; it may be on the meta device
    read   returns full tensors of the model by name
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
        tensors = {tensor: _convert(state, groups[tensor]) for tensor in shard}
        save_file(tensors, directory / name, metadata={"format": "pt"})


def _convert(state: Mapping[str, Tensor], group: Group) -> Tensor:
    """Return one tensor of theirs, assembled from tensors of ours."""
    tensor = torch.empty(group.shape, dtype=group.dtype, device="cpu")
    for weight in group.weights:
        weight.of_theirs(tensor).copy_(weight.of_ours(state[weight.ours]))
    return tensor


def _shards(groups: dict[str, Group], max_bytes: int) -> Iterator[list[str]]:
    """Yield the tensor names of each file: at most `max_bytes` per file, but at least one tensor."""
    shard: list[str] = []
    size = 0
    for name, group in groups.items():
        if shard and size + group.bytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += group.bytes
    yield shard
