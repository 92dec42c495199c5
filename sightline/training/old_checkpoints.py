"""Read the tensors of checkpoints of version 0.2, which torch.distributed.checkpoint wrote.

Their index, `.metadata`, is a pickle, which can run any code. Only the classes that a real index consists of are
loaded, and only tensors are read, with `weights_only`.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from sightline.paths import file_inside
from sightline.training.manifest import Damaged

INDEX = ".metadata"
METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = {
    *((METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((METADATA, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("Path", "PosixPath")),
}
"""(module, name) of the classes in an index. A path only says where the checkpoint was written; nothing opens it."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not part of an index of tensors")


class _Reader(dcp.FileSystemReader):
    """Reader that takes the index from `read_index`."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(checkpoint)
        self.checkpoint = checkpoint

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(self.checkpoint)


def read_index(checkpoint: Path) -> Metadata:
    """Return the index of a checkpoint of version 0.2.

    Raises:
        Damaged: if it is not an index of tensors in files of this directory.
        OSError: if the file system has an error.
    """
    try:
        with file_inside(checkpoint, INDEX).open("rb") as file:
            index = _Unpickler(file).load()
        for name, entry in index.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                raise ValueError(f"{name} is not a tensor")
        for stored in index.storage_data.values():
            file_inside(checkpoint, stored.relative_path)
            if stored.transform_descriptors:
                raise ValueError(f"{stored.relative_path} is transformed by {stored.transform_descriptors}")
        index.storage_meta.load_id = None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise Damaged(checkpoint, f"{INDEX} is not an index of tensors ({error})") from error
    return index


def read_old_tensors(checkpoint: Path, state: Mapping[str, Tensor], *, optional: str) -> set[str]:
    """Fill `state` in place, as `shards.read_shards`.

    Raises:
        Damaged: if the files cannot be read.
        ValueError: if a tensor is missing or has another shape.
    """
    stored: dict[str, Any] = read_index(checkpoint).state_dict_metadata
    wanted: dict[str, Tensor] = {}
    missing = set()
    for name, tensor in state.items():
        old = re.sub(r"^(model\..*\.)expert_bias$", r"\1balance", name)  # its name in version 0.2
        found = name if name in stored else old
        if found in stored:
            if tuple(stored[found].size) != tuple(tensor.shape):
                raise ValueError(f"{name} has the shape {list(stored[found].size)}, expected {list(tensor.shape)}")
            wanted[found] = tensor
        elif name.startswith(optional):
            missing.add(name)
        else:
            raise ValueError(f"{name} cannot be found in it")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(dict(wanted), storage_reader=_Reader(checkpoint), no_dist=True)
    except CheckpointException as error:  # not an Exception
        reason = next(iter(error.failures.values()))[0]
        raise Damaged(checkpoint, f"its tensors cannot be read ({type(reason).__name__}: {reason})") from error
    return missing
