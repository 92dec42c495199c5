"""Tensor and sequence parallelism: processes share the matrices of a layer, and between those its tokens.

A `TensorParallelLayer` layer (attention, feed-forward, experts, a memory) takes all tokens of a row, computes with its part of
the weights, and returns one summand of its result. What lies between (norms, the residual stream) works token by token,
and each process has S / degree tokens of it. So before a divisible layer the tokens are gathered, and behind it the
summands are added up and dealt out at once:

    embedding     whole rows [B, S, W] on every process; own part of the vocabulary
    norm          own tokens [B, S / degree, W]
    attention     all tokens, own heads
    norm          own tokens
    mlp           all tokens, own channels
    ...
    norm, output  whole rows; own part of the vocabulary

Without gradients (validation, generation) nothing has to be kept, so there the rows stay whole and may have any length.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor

from sightline.layers import TensorParallelLayer, routers_of
from sightline.models.decoder import Decoder
from sightline.numbers import divisors, nearest
from sightline.parallel import vocab_parallel
from sightline.parallel.mesh import Mesh
from sightline.parallel.patch import (
    View,
    after_forward,
    before_forward,
    expose_local_parameters,
    identity_view,
    replace_attribute,
    replace_parameter,
)
from sightline.parallel.redistribute import redistribute


def apply_tensor(model: Decoder, mesh: Mesh) -> None:
    """Cut a model, or one stage of a pipeline, over the axis `tensor`: first of all parallelisms, on the meta device.

    Every parameter becomes a DTensor over that axis, under the same name, and layers see the local part of it. What a
    model needs for this it says as data: `Decoder.hidden_state_modules` and `TensorParallelLayer.SHARD_DIMS`.
    """
    degree = mesh.size("tensor")
    if degree == 1:
        return
    check_degree(model, degree)
    tensor = mesh["tensor"]
    shard_parameters(model, tensor)
    for stack in model.hidden_state_modules():
        before_forward(stack, functools.partial(shard_tokens, tensor))
        after_forward(stack, functools.partial(unshard_tokens, tensor))
        for _, region in tensor_parallel_layers(stack):
            before_forward(region, functools.partial(all_gather_tokens, tensor))
            after_forward(region, functools.partial(reduce_scatter_tokens, tensor))
    for router in routers_of(model).values():
        # All processes route the same tokens, and their gradients are added up.
        replace_attribute(router, "aux_loss_coef", router.aux_loss_coef / degree)
    if model.embedding is not None:
        replace_attribute(
            model.embedding, "forward", functools.partial(vocab_parallel.embed_tokens, model.embedding, tensor)
        )
    replace_attribute(model, "logits", functools.partial(vocab_parallel.logits, tensor))
    replace_attribute(model, "token_losses", functools.partial(vocab_parallel.token_losses, tensor))


def tensor_parallel_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, TensorParallelLayer]]:
    """The outermost divisible layers of a module, by name: one inside another takes part in what the outer one does."""
    if isinstance(module, TensorParallelLayer):
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from tensor_parallel_layers(child, f"{prefix}.{name}" if prefix else name)


def check_degree(model: Decoder, degree: int) -> None:
    """Refuse a degree that does not divide what is dealt out, naming the nearest that divide all of it."""
    parts = [("tokens of the vocabulary", model.config.vocab_size)]
    parts += [
        part
        for stack in model.hidden_state_modules()
        for _, region in tensor_parallel_layers(stack)
        for part in region.tensor_parallel_units().items()
    ]
    bad = [f"the {count} {what}" for what, count in dict.fromkeys(parts) if count % degree]
    if bad:
        raise ValueError(
            f"parallel.tensor {degree} does not divide {' nor '.join(bad)} of {type(model).__name__}; "
            f"use parallel.tensor {nearest(degree, divisors(math.gcd(*(count for _, count in parts))))}"
        )


def shard_parameters(model: Decoder, mesh: DeviceMesh) -> None:
    """Make every parameter a DTensor, and show each module its local part of it."""
    views: dict[nn.Module, dict[str, View]] = {}
    for name, (placement, view) in plan_placements(model, mesh).items():
        owner, _, own_name = name.rpartition(".")
        module = model.get_submodule(owner)
        parameter = module.get_parameter(own_name)
        cut = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
        replace_parameter(module, own_name, cut)
        views.setdefault(module, {})[own_name] = view
    for module, named in views.items():
        expose_local_parameters(module, **named)


def plan_placements(model: Decoder, mesh: DeviceMesh) -> dict[str, tuple[Placement, View]]:
    """How each parameter lies on the processes, and what a layer sees of it.

    What is whole and used on whole rows has the same gradient everywhere. In a stack, a process uses it on its own
    tokens or for its own heads: its gradient is one summand.
    """

    def in_part(weight: Tensor) -> Tensor:
        return redistribute(weight, mesh, Replicate(), Replicate(), gradient=Partial())

    def share(weight: Tensor) -> Tensor:
        return in_part(weight) / mesh.size()

    names = {module: name for name, module in model.named_modules()}
    places: dict[str, tuple[Placement, View]] = {}
    for name, _ in model.named_parameters():
        is_end = name in ("embedding.weight", "output.weight")
        places[name] = (Shard(0) if is_end else Replicate(), identity_view)
    for stack in model.hidden_state_modules():
        for name, _ in stack.named_parameters(prefix=names[stack]):
            places[name] = (Replicate(), in_part)
        for prefix, region in tensor_parallel_layers(stack, names[stack]):
            for name, _ in region.named_parameters():
                dims = [dim for key, dim in region.SHARD_DIMS.items() if name == key or name.startswith(f"{key}.")]
                if dims:
                    places[f"{prefix}.{name}"] = (Shard(dims[0]), identity_view)
                elif name in region.PARTIAL_SUMS:
                    places[f"{prefix}.{name}"] = (Replicate(), share)
    return places


# Where tokens pass from one process to another, as hooks of modules; a gradient passes them the other way round.


def shard_tokens(mesh: DeviceMesh, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before a stack: of whole rows [B, S, W] this process's S / degree tokens."""
    if not torch.is_grad_enabled():
        return args
    return tuple(_shard(arg, mesh) if isinstance(arg, Tensor) else arg for arg in args)


def _shard(h: Tensor, mesh: DeviceMesh) -> Tensor:
    length, degree = h.shape[1], mesh.size()
    if length % degree:
        raise ValueError(
            f"parallel.tensor {degree} does not divide the {length} tokens of a row, which it shares between the "
            f"layers; use {length // degree * degree or degree} or {(length // degree + 1) * degree} tokens (with "
            f"parallel.context, of each of its processes), or parallel.tensor {nearest(degree, divisors(length))}"
        )
    return redistribute(h, mesh, Replicate(), Shard(1))


def unshard_tokens(mesh: DeviceMesh, module: nn.Module, args: tuple[Any, ...], h: Tensor) -> Tensor:
    """Behind a stack: the rows, whole on every process."""
    # A clone, since a stage of a pipeline must not return a view: schedules detach it in place.
    return redistribute(h, mesh, Shard(1), Replicate()).clone() if torch.is_grad_enabled() else h


def all_gather_tokens(mesh: DeviceMesh, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before a divisible layer: the tokens of all processes."""
    if not torch.is_grad_enabled():
        return args
    return redistribute(args[0], mesh, Shard(1), Replicate(), gradient=Partial()), *args[1:]


def reduce_scatter_tokens(mesh: DeviceMesh, module: nn.Module, args: tuple[Any, ...], summand: Tensor) -> Tensor:
    """Behind it: the sum of what all have computed for this process's tokens."""
    return redistribute(summand, mesh, Partial(), Shard(1) if torch.is_grad_enabled() else Replicate())
