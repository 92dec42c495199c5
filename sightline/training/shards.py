"""The tensors of a checkpoint: one safetensors file per rank, with the shards that this rank writes.

A shard is a box of a tensor. Its name in the file says which one: `name|offsets|shape of the tensor`, for example
`model.layers.0.attention.wq.weight|64,0|128,64`; a tensor that is not sharded is stored under its name. The header of a
file is therefore the index of a rank, and nothing grows with the number of ranks. Safetensors files hold no code.

Of the ranks with equal shards, one writes; `owner` computes which one, without communication.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from sightline.models.hf.files import open_safetensors
from sightline.models.weight_init import local_slices
from sightline.parallel.mesh import AXES, FLATTENED, Mesh
from sightline.parallel.redistribute import local_part
from sightline.paths import file_inside
from sightline.torch_private import is_dtensor
from sightline.training.manifest import FileSum, shard_file
from sightline.training.nested import flatten

RANDOM = "random."
"""Beginning of the names of random number states, which are the same on all ranks."""
MAX_WRITERS = 8
"""Replicas that share the writing of their shards."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names of dtypes in safetensors files."""


class Box(NamedTuple):
    """A part of a tensor: the offset and the size in each dimension, and the shape of the tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]

    def key(self, name: str) -> str:
        """Return the name of this part of the tensor `name` in a file."""
        if self.sizes == self.shape:
            return name
        return f"{name}|{','.join(map(str, self.offsets))}|{','.join(map(str, self.shape))}"


def local_box(tensor: Tensor) -> Box:
    """Return the part of a tensor that this rank stores."""
    shape = tuple(tensor.shape)
    if not is_dtensor(tensor):
        return Box((0,) * len(shape), shape, shape)
    slices = local_slices(tensor)
    return Box(tuple(part.start for part in slices), tuple(part.stop - part.start for part in slices), shape)


def owner(name: str, tensor: Tensor, mesh: Mesh | None) -> int:
    """Return the rank that writes this rank's shard of a tensor.

    The ranks with equal shards have equal indices along the axes that shard the tensor. Of the first MAX_WRITERS
    replicas, the name of the tensor selects one, so that they share the work. Along each other axis it is the first
    rank. A rank therefore finds all its shards in a few files, however many ranks there are.
    """
    if mesh is None or mesh.world == 1 or name.startswith(RANDOM):
        return 0
    sharding = {"pipeline"}
    writers = min(mesh.size("replicate"), MAX_WRITERS) if is_dtensor(tensor) else 1
    if is_dtensor(tensor):
        for axis, placement in zip(tensor.device_mesh.mesh_dim_names or (), tensor.placements, strict=True):
            if not placement.is_replicate():  # a strided shard is no Shard
                sharding |= set(EXPANDED.get(axis, (axis,)))
    rank = 0
    for axis in AXES:
        chosen = zlib.crc32(name.encode()) % writers if axis == "replicate" else 0
        rank = rank * mesh.size(axis) + (mesh.index(axis) if axis in sharding else chosen)
    return rank


EXPANDED = {**FLATTENED, "expert": FLATTENED["weights"], "expert_weights": FLATTENED["weights"]}
"""The axes of AXES of which another axis consists."""


def shards_to_write(state: Mapping[str, Any], mesh: Mesh | None) -> dict[str, Tensor]:
    """Return the local shards that this rank writes, by their name in the file."""
    rank = mesh.rank if mesh else 0
    return {
        local_box(tensor).key(name): local_part(tensor).detach()
        for name, tensor in flatten(state).items()
        if owner(name, tensor, mesh) == rank and local_part(tensor).numel()
    }


def count_elements(state: Mapping[str, Any], mesh: Mesh | None) -> int:
    """Return a number whose sum over all ranks is the number of elements of all tensors."""
    if mesh is not None and mesh.rank % (mesh.world // mesh.size("pipeline")):
        return 0  # the first rank of each pipeline stage counts
    return sum(
        tensor.numel()
        for name, tensor in flatten(state).items()
        if not name.startswith(RANDOM) or mesh is None or mesh.rank == 0
    )


def write_shards(path: Path, shards: Mapping[str, Tensor]) -> FileSum:
    """Write a safetensors file and flush it to disk.

    Raises:
        OSError: if it cannot be written.
    """
    ordered = sorted(shards.items(), key=lambda item: -item[1].element_size())  # keeps every tensor aligned
    header, end = {}, 0
    for key, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    prefix = memoryview(len(encoded).to_bytes(8, "little") + encoded)
    digest = xxhash.xxh3_128()
    # A thread computes the checksum while this one writes: both release the GIL.
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(max_workers=1) as thread:
        for data in itertools.chain([prefix], (_bytes_of(tensor) for _, tensor in ordered)):
            updated = thread.submit(digest.update, data)
            rest = data
            while rest:
                rest = rest[file.write(rest) :]
            updated.result()
        os.fsync(file.fileno())
    return FileSum(len(prefix) + end, digest.hexdigest())


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_shards(
    checkpoint: Path, state: Mapping[str, Tensor], ranks: int, *, optional: str, mesh: Mesh | None = None
) -> set[str]:
    """Fill the local shards of `state` in place; return the names of optional tensors that the files do not have.

    ranks     number of files of shards
    optional  beginning of the names of tensors that may be missing
    mesh      the mesh, if the checkpoint was written on an equal one: this rank then reads only the files in which its
              shards are. Otherwise it reads the files in order until it has all tensors

    Raises:
        ValueError: if a tensor is missing or has another shape, or a file cannot be read.
    """
    needed = {name: (local_box(tensor), local_part(tensor)) for name, tensor in state.items()}
    missing = {name: part.numel() for name, (_, part) in needed.items() if part.numel()}
    likely = {owner(name, tensor, mesh) for name, tensor in state.items()} if mesh else set()
    for rank in dict.fromkeys([*sorted(likely), *range(ranks)]):
        if not missing:
            break
        path = file_inside(checkpoint, shard_file(rank))
        with open_safetensors(path) as file:
            for key, name, stored in _stored(file, needed):
                box, part = needed[name]
                if stored.shape != box.shape:
                    raise ValueError(f"{name} has the shape {list(stored.shape)}, expected {list(box.shape)}")
                missing[name] = missing.get(name, 0) - _copy_overlap(file, key, stored, box, part)
                if missing[name] <= 0:
                    del missing[name]
    absent = [name for name in missing if not name.startswith(optional)]
    if absent:
        more = f" and {len(absent) - 1} more tensors" if len(absent) > 1 else ""
        raise ValueError(f"{absent[0]}{more} cannot be found in it")
    return set(missing)


def _stored(file: Any, needed: Mapping[str, Any]) -> Iterator[tuple[str, str, Box]]:
    """Yield (name in the file, name of the tensor, box) of the shards of needed tensors."""
    for key in file.keys():  # noqa: SIM118  # not a dict
        name, *numbers = key.split("|")
        if name not in needed:
            continue
        sizes = tuple(file.get_slice(key).get_shape())
        if not numbers:
            yield key, name, Box((0,) * len(sizes), sizes, sizes)
            continue
        offsets, shape = (tuple(map(int, part.split(","))) for part in numbers)
        if len(offsets) != len(sizes) or len(shape) != len(sizes):
            raise ValueError(f"{key} names {len(offsets)} and {len(shape)} dimensions, but has {len(sizes)}")
        yield key, name, Box(offsets, sizes, shape)


def _copy_overlap(file: Any, key: str, stored: Box, box: Box, part: Tensor) -> int:
    """Copy into `part`, which holds `box`, what a stored shard has of it; return the number of elements."""
    start = [max(pair) for pair in zip(stored.offsets, box.offsets, strict=True)]
    stop = [
        min(first + size, other + wanted)
        for first, size, other, wanted in zip(stored.offsets, stored.sizes, box.offsets, box.sizes, strict=True)
    ]
    if any(first >= last for first, last in zip(start, stop, strict=True)):
        return 0
    source = _slices(start, stop, stored.offsets)
    values = file.get_tensor(key) if not start else file.get_slice(key)[source]
    part[_slices(start, stop, box.offsets)].copy_(values)
    return math.prod(last - first for first, last in zip(start, stop, strict=True))


def _slices(start: Iterable[int], stop: Iterable[int], offsets: Iterable[int]) -> tuple[slice, ...]:
    return tuple(slice(a - offset, b - offset) for a, b, offset in zip(start, stop, offsets, strict=True))
