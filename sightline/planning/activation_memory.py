"""Activation memory and communication of one layer, measured by tracing it on fake tensors.

The layer is the one that training uses, after tensor parallelism and recompute are applied. Its forward and backward
run on PyTorch's fake tensors and fake process groups, which have shapes but no data, so estimates follow the code.
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

from sightline.attention import KernelRequirements, Lowered
from sightline.attention.exchange import CompletedExchange
from sightline.attention.native import Intervals, Native
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
    """Bytes of one layer and one micro-batch.

    saved            activations saved for the backward, including the layer's output
    workspace        peak memory of the backward, including recompute, in addition to `saved`
    tensor_received  received from other ranks of `tensor`, forward and backward
    context_shared   local keys and values, or inputs of recurrent layers, that other ranks of `context` may need
    routed_tokens    hidden states of all tokens for each expert they are routed to
    """

    saved: float
    workspace: float
    tensor_received: float
    context_shared: float
    routed_tokens: float


TraceCache = dict[Hashable, ActivationMemory]
"""Activation memory of layers that are alike, by `_layer_kind`."""


def trace(
    stage: Decoder, mesh: Mesh, shape: tuple[int, int], dtype: str, cache: TraceCache
) -> dict[str, ActivationMemory]:
    """Return the activation memory of every layer of a stage, by name. The stage is a skeleton on the meta device.

    shape  (B, S / context degree) of a micro-batch
    cache  results for the layers of other stages; new ones are added
    """
    # FSDP all-gathers parameters in the compute dtype; without FSDP, autocast casts them.
    parameter_dtype = torch.bfloat16 if mesh.size("loss") > 1 and dtype == "bfloat16" else torch.float32
    layers = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialize(stage, parameter_dtype)
        h = torch.empty(*shape, stage.config.hidden_size, dtype=parameter_dtype)
        if mesh.size("tensor") > 1:
            (h,) = shard_tokens(mesh["tensor"], stage.layers, (h,))
        for name, layer in stage.layers.items():
            kind = _layer_kind(layer)
            if kind not in cache:
                cache[kind] = _trace_layer(stage, layer, h.detach().clone().requires_grad_(), shape, dtype)
            layers[name] = cache[kind]
    return layers


def materialize(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace parameters and buffers on the meta device by fake CPU tensors."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            replace_parameter(part, name, _fake_parameter(parameter, dtype))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _fake_parameter(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    local = torch.empty(local_part(parameter).shape, dtype=dtype)
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def _layer_kind(layer: nn.Module) -> Hashable:
    """Key that is equal for layers with the same activation memory."""
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    return type(layer).__name__, layer.mask_name, forward_is_replaced(layer), shapes


def _trace_layer(stage: Decoder, layer: nn.Module, x: Tensor, shape: tuple[int, int], dtype: str) -> ActivationMemory:
    """Run one forward and backward of a layer on the hidden states `x`, under a causal mask."""
    mask = AttentionMask(torch.zeros(*shape, 1, dtype=torch.int32), torch.ones(*shape, 1, dtype=torch.int32), shape[1])
    exchange = CountingExchange(mask)
    # The operators of this backend are traced like any other, and save what all fused kernels save.
    inputs = Intervals(torch.zeros(0, dtype=torch.int32))
    needs = KernelRequirements(
        device=x.device,
        dtype=torch.bfloat16 if dtype == "bfloat16" else x.dtype,
        training=True,
        sinks=True,
        softcap=True,
    )
    segments = torch.zeros(shape, dtype=torch.int64)
    lowered = Lowered(mask, Native(), "", needs, inputs, exchange, mask.visible_queries(), segments)
    encoding = stage.encode_positions(torch.zeros(shape, dtype=torch.int64))
    routed: list[float] = []

    def route_evenly(experts: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Replace the fake token counts of the experts by real, even ones: the grouped matmul reads their values."""
        tokens, counts = args
        routed.append(bytes_of(tokens))
        with unset_fake_temporarily():
            return tokens, (torch.arange(len(counts) + 1) * len(tokens) // len(counts)).diff()

    hooks = [part.register_forward_pre_hook(route_evenly) for part in layer.modules() if isinstance(part, Experts)]
    existing = [x, *layer.parameters(), *(leaf for leaf in tree_leaves(encoding) if isinstance(leaf, Tensor))]
    with MemoryTracker(existing) as tracker:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            y = layer(x, lowered, encoding, None)
        saved = tracker.allocated()
        y.backward(torch.empty_like(y))
    for hook in hooks:
        hook.remove()
    for parameter in layer.parameters():
        parameter.grad = None
    return ActivationMemory(
        saved=saved,
        workspace=tracker.peak - saved,
        tensor_received=tracker.received,
        context_shared=exchange.bytes,
        routed_tokens=routed[0] if routed else 0.0,  # a recompute appends a second entry
    )


class CountingExchange:
    """Sends nothing and counts the bytes of the tensors that ranks of `context` would exchange."""

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
    """Tracks the memory allocated by operations, its peak, and the bytes received by collectives.

    existing  tensors that are allocated already; their views are not counted
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.existing = {StorageWeakRef(local_part(tensor).untyped_storage()) for tensor in existing}
        self.sizes: dict[StorageWeakRef, int] = {}
        self.peak = self.received = self.upper_bound = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor):
                continue
            storage = local_part(leaf).untyped_storage()
            reference = StorageWeakRef(storage)
            if reference not in self.existing:
                if reference not in self.sizes:
                    self.upper_bound += storage.nbytes()
                self.sizes[reference] = storage.nbytes()
        if self.upper_bound > 1.01 * self.peak:  # `allocated` is slow: call it only if there may be a new peak
            self.peak = max(self.peak, self.allocated())
        self.received += _received(func, args, out)
        return out

    def allocated(self) -> float:
        """Bytes of the tracked storages that are still alive."""
        self.sizes = {reference: size for reference, size in self.sizes.items() if not reference.expired()}
        self.upper_bound = float(sum(self.sizes.values()))
        return self.upper_bound


def _received(func: Any, args: tuple[Any, ...], out: Any) -> float:
    """Bytes that a rank receives in a collective over n ranks: (n - 1) / n of the full tensor."""
    full_bytes = {
        "all_gather_into_tensor": lambda: bytes_of(out),
        "reduce_scatter_tensor": lambda: bytes_of(args[0]),
        "all_reduce": lambda: 2 * bytes_of(out),  # a reduce-scatter and an all-gather
    }.get(func.__name__.partition(".")[0])
    if func.namespace != "_c10d_functional" or full_bytes is None:
        return 0.0
    ranks = dist.get_world_size(process_group_of(args[-1]))
    return full_bytes() * (ranks - 1) / ranks


def bytes_of(x: Tensor) -> float:
    return float(x.numel() * x.element_size())
