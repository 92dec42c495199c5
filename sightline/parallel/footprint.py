"""What one layer keeps and sends, found by running it on tensors without memory.

The layer is the real one, cut by the real tensor parallelism and changed by the real recompute, under PyTorch's fake
tensors and fake process groups: shapes pass through forward and backward, numbers do not. So what is counted here
cannot drift from what training does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sightline.attention import Lowered
from sightline.attention.exchange import Arrived
from sightline.attention.tiled import Slice, Tiled, Tiles
from sightline.layers import Experts
from sightline.masks import AttentionMask


@dataclass(frozen=True)
class Footprint:
    """Bytes of one layer and one microbatch.

    kept      what waits for the backward, the layer's result included
    working   what the backward, and a recompute in it, has at its height on top of that
    tensor    what comes from other processes of `tensor`, forward and backward
    keys      what this process's tokens are as keys, or what else of them other processes of `context` need
    routed    the rows of all chosen experts
    """

    kept: float
    working: float
    tensor: float
    keys: float
    routed: float


@contextmanager
def pretending(world: int, rank: int) -> Iterator[None]:
    """Let this process be rank `rank` of `world` whose collectives do nothing."""
    assert not dist.is_initialized(), "a process that is part of a job cannot pretend to be part of another"
    if world > 1:
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        if world > 1:
            dist.destroy_process_group()


def trace(
    stage: Any, shape: tuple[int, int], dtype: str, found: dict[Any, Footprint], *, gathered: bool
) -> dict[str, Footprint]:
    """The footprint of every layer of a stage (a skeleton, cut by tensor parallelism or whole), by its name.

    shape     (B, S) of a microbatch: of its rows, the tokens that a process of `context` has
    found     of the kinds of layers met in other stages of the same run; grows
    gathered  whether FSDP gathers the weights, in the precision they compute in; else autocast copies them
    """
    weights = torch.bfloat16 if gathered and dtype == "bfloat16" else torch.float32
    named = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        give_memory(stage, weights)
        h = torch.empty(*shape, stage.config.width, dtype=weights)
        for cut in stage.layers._forward_pre_hooks.values():  # tensor parallelism's: of whole rows the own tokens
            (h,) = cut(stage.layers, (h,))
        for name, layer in stage.layers.items():
            kind = _kind(layer)
            if kind not in found:
                found[kind] = _run(stage, layer, h.detach().clone().requires_grad_(), shape, dtype)
            named[name] = found[kind]
    return named


def give_memory(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and buffers from the meta device to fake tensors of a CPU."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(_fake(parameter, dtype))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _fake(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(parameter, DTensor):
        return torch.empty(parameter.shape, dtype=dtype)
    local = torch.empty(parameter.to_local().shape, dtype=dtype)
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _kind(layer: nn.Module) -> Any:
    """Layers of one kind leave the same footprint."""
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    return type(layer).__name__, layer.mask_name, "forward" in vars(layer), shapes


def _run(stage: Any, layer: nn.Module, x: Tensor, shape: tuple[int, int], dtype: str) -> Footprint:
    """One forward and backward of a layer, from the hidden states that come into it."""
    rows, length = shape
    mask = AttentionMask(torch.zeros(*shape, 1, dtype=torch.int32), torch.ones(*shape, 1, dtype=torch.int32), length)
    exchange = CountingExchange(mask)
    tiles = Tiles([(row, 0, length, [Slice(0, length, True, None)]) for row in range(rows)], False)
    lowered = Lowered(mask, Tiled(), "", tiles, exchange, mask.seeing(), torch.zeros(shape, dtype=torch.int64))
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
    with Ledger(given) as ledger:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            y = layer(x, lowered, encoding, None)
        kept = ledger.alive()
        y.backward(torch.empty_like(y))
    for hook in hooks:
        hook.remove()
    for parameter in layer.parameters():
        parameter.grad = None
    return Footprint(
        kept=kept,
        working=ledger.peak - kept,
        tensor=ledger.received,
        keys=exchange.bytes,
        routed=routed[0] if routed else 0.0,  # a recompute routes once more
    )


class CountingExchange:
    """Sends nothing, and counts the bytes that other processes of `context` would be sent."""

    def __init__(self, whole_mask: AttentionMask) -> None:
        self.whole_mask, self.bytes = whole_mask, 0.0

    def start(self, *tensors: Tensor) -> Arrived:
        return Arrived(self._count(*tensors))

    def to_whole_rows(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self._count(*tensors)

    def to_local_tokens(self, x: Tensor) -> Tensor:
        return self._count(x)[0]

    def local_channels(self, weight: Tensor) -> Tensor:
        return weight

    def _count(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        self.bytes += sum(map(bytes_of, tensors))
        return tensors


class Ledger(TorchDispatchMode):
    """Counts the memory of what operations make, as long as it is held, and what collectives bring.

    given  tensors that are there already; a view of one is nothing new
    """

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.given = {_storage(tensor)._cdata for tensor in given}
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.received = self.bound = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and (storage := _storage(leaf))._cdata not in self.given:
                if storage._cdata not in self.held:
                    self.bound += storage.nbytes()
                self.held[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self.bound > 1.01 * self.peak:  # what is held is no more than that; looking takes long
            self.peak = max(self.peak, self.alive())
        self.received += _received(func, args, out)
        return out

    def alive(self) -> float:
        self.held = {key: held for key, held in self.held.items() if not held[0].expired()}
        self.bound = float(sum(size for _, size in self.held.values()))
        return self.bound


def _storage(x: Tensor) -> torch.UntypedStorage:
    return (x.to_local() if isinstance(x, DTensor) else x).untyped_storage()


def _received(func: Any, args: tuple[Any, ...], out: Any) -> float:
    """Bytes that a collective over n processes brings to each: all but its own n-th part of the whole."""
    whole = {
        "all_gather_into_tensor": lambda: bytes_of(out),
        "reduce_scatter_tensor": lambda: bytes_of(args[0]),
        "all_reduce": lambda: 2 * bytes_of(out),  # a reduce-scatter and an all-gather
    }.get(func.__name__.partition(".")[0])
    if func.namespace != "_c10d_functional" or whole is None:
        return 0.0
    processes = dist.get_world_size(_resolve_process_group(args[-1]))
    return whole() * (processes - 1) / processes


def bytes_of(x: Tensor) -> float:
    return float(x.numel() * x.element_size())
