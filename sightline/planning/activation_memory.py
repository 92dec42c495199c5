"""What one layer keeps and sends, found by running it on tensors without memory.

The layer is the real one, cut by tensor parallelism and changed by recompute, under PyTorch's fake tensors and fake
process groups: shapes pass through forward and backward, numbers do not. So counts cannot drift from training.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef

from sightline.attention import Lowered
from sightline.attention.exchange import CompletedExchange
from sightline.attention.tiled import Slice, Tiled, Tiles
from sightline.layers import Experts
from sightline.masks import AttentionMask
from sightline.models.decoder import Decoder
from sightline.parallel.mesh import Mesh
from sightline.parallel.patch import forward_is_replaced, replace_parameter
from sightline.parallel.redistribute import local_part
from sightline.parallel.tensor import shard_tokens
from sightline.planning.torch_private import (
    FakeTensorMode,
    TorchDispatchMode,
    process_group_of,
    tree_leaves,
    unset_fake_temporarily,
)


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes of one layer and one microbatch.

    kept      what waits for the backward, the layer's result included
    working   what the backward, and a recompute in it, has at its height on top of that
    tensor    what comes from other processes of `tensor`, forward and backward
    keys      what this process's tokens are as keys, or what else of them other processes of `context` need
    routed    the rows of all chosen experts
    """

    saved: float
    workspace: float
    tensor: float
    keys: float
    routed_tokens: float


Kinds = dict[Hashable, ActivationMemory]
"""By what makes layers of one kind."""


def trace(stage: Decoder, mesh: Mesh, shape: tuple[int, int], dtype: str, found: Kinds) -> dict[str, ActivationMemory]:
    """The activation memory of every layer of a stage (a skeleton, cut by tensor parallelism or whole), by its name.

    shape  (B, S) of a microbatch: of its rows, the tokens that a process of `context` has
    found  of the layers met in other stages of the same run; grows
    """
    # FSDP gathers the weights in the precision they compute in; without it autocast copies them.
    weights = torch.bfloat16 if mesh.size("loss") > 1 and dtype == "bfloat16" else torch.float32
    named = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialize(stage, weights)
        h = torch.empty(*shape, stage.config.hidden_size, dtype=weights)
        if mesh.size("tensor") > 1:
            (h,) = shard_tokens(mesh["tensor"], stage.layers, (h,))
        for name, layer in stage.layers.items():
            kind = _kind(layer)
            if kind not in found:
                found[kind] = _run(stage, layer, h.detach().clone().requires_grad_(), shape, dtype)
            named[name] = found[kind]
    return named


def materialize(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and buffers from the meta device to fake tensors of a CPU."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            replace_parameter(part, name, _fake(parameter, dtype))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _fake(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    local = torch.empty(local_part(parameter).shape, dtype=dtype)
    if not isinstance(parameter, DTensor):
        return local
    axes, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        local, axes, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def _kind(layer: nn.Module) -> Hashable:
    """Layers of one kind keep and send the same."""
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    return type(layer).__name__, layer.mask_name, forward_is_replaced(layer), shapes


def _run(stage: Decoder, layer: nn.Module, x: Tensor, shape: tuple[int, int], dtype: str) -> ActivationMemory:
    """One forward and backward of a layer, from the hidden states that come into it."""
    rows, length = shape
    mask = AttentionMask(torch.zeros(*shape, 1, dtype=torch.int32), torch.ones(*shape, 1, dtype=torch.int32), length)
    exchange = CountingExchange(mask)
    tiles = Tiles([(row, 0, length, [Slice(0, length, True, None)]) for row in range(rows)], False)
    lowered = Lowered(mask, Tiled(), "", tiles, exchange, mask.visible_queries(), torch.zeros(shape, dtype=torch.int64))
    encoding = stage.encode_positions(torch.zeros(shape, dtype=torch.int64))
    routed: list[float] = []

    def route_evenly(experts: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Real counts in place of fake ones, which the products of the groups have to read."""
        rows, counts = args
        routed.append(bytes_of(rows))
        with unset_fake_temporarily():
            return rows, (torch.arange(len(counts) + 1) * len(rows) // len(counts)).diff()

    hooks = [part.register_forward_pre_hook(route_evenly) for part in layer.modules() if isinstance(part, Experts)]
    given = [x, *layer.parameters(), *(leaf for leaf in tree_leaves(encoding) if isinstance(leaf, Tensor))]
    with MemoryTracker(given) as tracker:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            y = layer(x, lowered, encoding, None)
        kept = tracker.alive()
        y.backward(torch.empty_like(y))
    for hook in hooks:
        hook.remove()
    for parameter in layer.parameters():
        parameter.grad = None
    return ActivationMemory(
        saved=kept,
        workspace=tracker.peak - kept,
        tensor=tracker.received,
        keys=exchange.bytes,
        routed_tokens=routed[0] if routed else 0.0,  # a recompute routes once more
    )


class CountingExchange:
    """Sends nothing, and counts the bytes that other processes of `context` would be sent."""

    def __init__(self, full_mask: AttentionMask) -> None:
        self.full_mask, self.bytes = full_mask, 0.0

    def start(self, *tensors: Tensor) -> CompletedExchange:
        return CompletedExchange(self._count(*tensors))

    def to_full_rows(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._count(*tensors)

    def to_local_tokens(self, x: Tensor) -> Tensor:
        return self._count(x)[0]

    def local_channels(self, weight: Tensor) -> Tensor:
        return weight

    def _count(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.bytes += sum(map(bytes_of, tensors))
        return tensors


class MemoryTracker(TorchDispatchMode):
    """Counts the memory of what operations make, as long as it is held, and what collectives bring.

    given  tensors that are there already; a view of one is nothing new
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.given = {StorageWeakRef(local_part(tensor).untyped_storage()) for tensor in given}
        self.held: dict[StorageWeakRef, int] = {}
        self.peak = self.received = self.bound = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor):
                continue
            storage = local_part(leaf).untyped_storage()
            reference = StorageWeakRef(storage)
            if reference not in self.given:
                if reference not in self.held:
                    self.bound += storage.nbytes()
                self.held[reference] = storage.nbytes()
        if self.bound > 1.01 * self.peak:  # what is held is no more than that; looking takes long
            self.peak = max(self.peak, self.alive())
        self.received += _received(func, args, out)
        return out

    def alive(self) -> float:
        self.held = {reference: size for reference, size in self.held.items() if not reference.expired()}
        self.bound = float(sum(self.held.values()))
        return self.bound


def _received(func: Any, args: tuple[Any, ...], out: Any) -> float:
    """Bytes that a collective over n processes brings to each: all but its own n-th part of the whole."""
    whole = {
        "all_gather_into_tensor": lambda: bytes_of(out),
        "reduce_scatter_tensor": lambda: bytes_of(args[0]),
        "all_reduce": lambda: 2 * bytes_of(out),  # a reduce-scatter and an all-gather
    }.get(func.__name__.partition(".")[0])
    if func.namespace != "_c10d_functional" or whole is None:
        return 0.0
    processes = dist.get_world_size(process_group_of(args[-1]))
    return whole() * (processes - 1) / processes


def bytes_of(x: Tensor) -> float:
    return float(x.numel() * x.element_size())
