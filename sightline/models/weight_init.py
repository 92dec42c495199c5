"""Fresh weights that are the same however the model is cut up."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sightline.torch_private import is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def init_model_weights(*parts: Any) -> None:
    """`init_weights()` of a model, or of several stages of one, every weight from random numbers of its own.

    `torch.manual_seed` before it decides them. They depend on the seed and on the weight's name alone. So a pipeline
    stage draws only what it has, and a weight that is sharded (a DTensor) is drawn whole and cut: on any mesh the model
    begins as it does on one process.
    """
    seed = int(torch.randint(2**62, (), device="cpu"))
    for part in parts:
        with _ByName(part, seed):
            part.init_weights()


def is_initializing() -> bool:
    """Whether weights are being drawn: then `module.weight` has to be the whole parameter, however it is cut."""
    return _ByName.active


class _ByName(TorchFunctionMode):
    """Gives each parameter that is drawn a generator seeded by its name."""

    active = False

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.seed = seed

    def __enter__(self) -> _ByName:
        _ByName.active = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _ByName.active = False
        super().__exit__(*error)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in FILLS:
            return func(*args, **kwargs)
        target, *rest = args or (kwargs.pop("tensor"),)
        assert id(target) in self.names, "init_weights draws whole parameters of the model"
        if not target.is_meta:
            digest = hashlib.sha256(f"{self.seed}/{self.names[id(target)]}".encode()).digest()
            generator = torch.Generator(target.device).manual_seed(int.from_bytes(digest[:8]) >> 1)
            fill_parameter(target, lambda whole: func(whole, *rest, **{**kwargs, "generator": generator}))
        return target


FILLS = (nn.init.normal_, nn.init.uniform_, Tensor.normal_, Tensor.uniform_)
"""What init_weights may draw with."""


@torch.no_grad()
def fill_parameter(target: Tensor, fill: Callable[[Tensor], Tensor]) -> None:
    """Fill a parameter, whole or sharded."""
    if not is_dtensor(target):
        fill(target)
        return
    whole = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    target.to_local().copy_(local_shard(fill(whole), target))


def local_shard(whole: Tensor, target: DTensor) -> Tensor:
    """The part of a whole tensor that this process holds of a DTensor of its shape. A view."""
    coordinate = target.device_mesh.get_coordinate()
    assert coordinate is not None, "a process holds only tensors of meshes it is part of"
    axes = list(zip(target.placements, coordinate, target.device_mesh.shape, strict=True))
    # FSDP over tensor parallelism is a strided shard: it cuts what the inner axes have cut before.
    axes.sort(key=lambda axis: hasattr(axis[0], "split_factor"))
    for placement, index, size in axes:
        if placement.is_replicate():
            continue
        dim = placement.dim  # type: ignore[attr-defined]
        step = -(-whole.shape[dim] // size)  # as torch.chunk: the last parts may be short or empty
        first = min(index * step, whole.shape[dim])
        whole = whole.narrow(dim, first, min(step, whole.shape[dim] - first))
    return whole
