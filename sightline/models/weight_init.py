"""Weight initialization that does not depend on how the model is sharded."""

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


def init_model_weights(*models: Any) -> None:
    """Call `init_weights()` of a model, or of several pipeline stages, with a separate random generator per weight.

    A weight depends only on its name and on the seed of `torch.manual_seed`. A pipeline stage initializes only its own
    weights, and a sharded weight (a DTensor) is initialized in full and then sharded, so the initial model is the same
    on any device mesh.
    """
    seed = int(torch.randint(2**62, (), device="cpu"))
    for model in models:
        with _GeneratorPerParameter(model, seed):
            model.init_weights()


def is_initializing() -> bool:
    """Whether weights are being initialized: `module.weight` must then be the full parameter, even if it is sharded."""
    return _GeneratorPerParameter.active


class _GeneratorPerParameter(TorchFunctionMode):
    """Run the init functions in `FILLS` with a generator seeded by the parameter's name."""

    active = False

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.seed = seed

    def __enter__(self) -> _GeneratorPerParameter:
        _GeneratorPerParameter.active = True
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _GeneratorPerParameter.active = False
        super().__exit__(*error)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func not in FILLS:
            return func(*args, **kwargs)
        target, *rest = args or (kwargs.pop("tensor"),)
        assert id(target) in self.names, "init_weights may initialize only full parameters of the model"
        if not target.is_meta:
            digest = hashlib.sha256(f"{self.seed}/{self.names[id(target)]}".encode()).digest()
            generator = torch.Generator(target.device).manual_seed(int.from_bytes(digest[:8]) >> 1)
            fill_parameter(target, lambda full: func(full, *rest, **{**kwargs, "generator": generator}))
        return target


FILLS = (nn.init.normal_, nn.init.uniform_, Tensor.normal_, Tensor.uniform_)
"""Random init functions that `init_weights` may use."""


@torch.no_grad()
def fill_parameter(target: Tensor, fill: Callable[[Tensor], Tensor]) -> None:
    """Fill a full or sharded parameter; `fill` receives a tensor of the full shape."""
    if not is_dtensor(target):
        fill(target)
        return
    full = torch.empty(target.shape, dtype=target.dtype, device=target.device)
    target.to_local().copy_(local_shard(fill(full), target))


def local_shard(full: Tensor, target: DTensor) -> Tensor:
    """Return a view of the part of a full tensor that this rank stores if it is sharded like `target`."""
    return full[local_slices(target)]


def local_slices(target: DTensor) -> tuple[slice, ...]:
    """Return the part of a sharded tensor that this rank stores: a slice of each dimension."""
    coordinate = target.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank is not in the DTensor's device mesh"
    axes = list(zip(target.placements, coordinate, target.device_mesh.shape, strict=True))
    # FSDP over tensor parallelism is a strided shard: it shards what the inner axes have sharded already.
    axes.sort(key=lambda axis: hasattr(axis[0], "split_factor"))
    slices = [slice(0, size) for size in target.shape]
    for placement, index, size in axes:
        if placement.is_replicate():
            continue
        dim = placement.dim  # type: ignore[attr-defined]
        start, stop = slices[dim].start, slices[dim].stop
        step = -(-(stop - start) // size)  # as torch.chunk: the last shards may be smaller or empty
        first = min(start + index * step, stop)
        slices[dim] = slice(first, min(first + step, stop))
    return tuple(slices)
