"""Tensor and sequence parallelism: ranks share the matrices of a layer, and the tokens between these layers.

A `TensorParallelLayer` (attention, feed-forward, experts, recurrent layer) takes all tokens of a row, computes with its
shard of the weights, and returns a partial sum of its output. All other operations (norms, the residual stream) work
token by token, so each rank computes them on S / degree tokens. Tokens are all-gathered before a tensor parallel layer,
and its partial sums are reduce-scattered:

    embedding     full rows [B, S, W] on every rank; local shard of the vocabulary
    norm          local tokens [B, S / degree, W]
    attention     all tokens, local heads
    norm          local tokens
    mlp           all tokens, local channels
    ...
    norm, output  full rows; local shard of the vocabulary

Without gradients (validation, generation) no activations are saved, so tokens are not sharded and a row may have any
length.
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
from sightline.parallel.mesh import Degrees, Mesh
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
    """Shard a model on the meta device, or one pipeline stage, across the axis `tensor`, before other parallelisms.

    Every parameter becomes a DTensor of the same name on that axis; layers compute with its local shard. Models declare
    what to shard in `Decoder.hidden_state_modules` and `TensorParallelLayer.SHARD_DIMS`.

    `check_tensor` has checked the degree.
    """
    degree = mesh.size("tensor")
    if degree == 1:
        return
    tensor = mesh["tensor"]
    shard_parameters(model, tensor)
    for module in model.hidden_state_modules():
        before_forward(module, functools.partial(shard_tokens, tensor))
        after_forward(module, functools.partial(unshard_tokens, tensor))
        for _, layer in tensor_parallel_layers(module):
            before_forward(layer, functools.partial(all_gather_tokens, tensor))
            after_forward(layer, functools.partial(reduce_scatter_tokens, tensor))
    for router in routers_of(model).values():
        # All ranks route the same tokens and compute the same auxiliary loss, and their gradients are summed.
        replace_attribute(router, "aux_loss_coef", router.aux_loss_coef / degree)
    if model.embedding is not None:
        replace_attribute(
            model.embedding, "forward", functools.partial(vocab_parallel.embed_tokens, model.embedding, tensor)
        )
    replace_attribute(model, "logits", functools.partial(vocab_parallel.logits, tensor))
    replace_attribute(model, "token_losses", functools.partial(vocab_parallel.token_losses, tensor))


def tensor_parallel_layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, TensorParallelLayer]]:
    """Yield the outermost tensor parallel layers of a module and their names; nested ones belong to the outer layer."""
    if isinstance(module, TensorParallelLayer):
        yield prefix, module
        return
    for name, child in module.named_children():
        yield from tensor_parallel_layers(child, f"{prefix}.{name}" if prefix else name)


def check_tensor(model: Decoder, degrees: Degrees, length: int) -> None:
    """Check that the degree of `tensor` divides the units of all layers, and the tokens of rows of `length` tokens.

    Raises:
        ValueError: if it does not divide the vocabulary, the heads or channels of a layer, or the tokens of a row that
            each rank of `context` has.
    """
    degree, context = degrees.size("tensor"), degrees.size("context")
    units = [("tokens of the vocabulary", model.config.vocab_size)]
    units += [
        unit
        for module in model.hidden_state_modules()
        for _, layer in tensor_parallel_layers(module)
        for unit in layer.tensor_parallel_units().items()
    ]
    indivisible = [f"the {count} {name}" for name, count in dict.fromkeys(units) if count % degree]
    if indivisible:
        raise ValueError(
            f"parallel.tensor {degree} does not divide {' nor '.join(indivisible)} of {type(model).__name__}; "
            f"use parallel.tensor {nearest(degree, divisors(math.gcd(*(count for _, count in units))))}"
        )
    local, multiple = length // context, degree * context
    if local % degree:
        lengths = sorted({max(multiple, length // multiple * multiple), (length // multiple + 1) * multiple})
        per_rank = f" that each of {context} ranks of parallel.context has" if context > 1 else ""
        raise ValueError(
            f"parallel.tensor {degree} does not divide the {local} tokens of a row{per_rank}, which it shards between "
            f"layers; use --training.sequence-length {' or '.join(map(str, lengths))}, or parallel.tensor "
            f"{nearest(degree, divisors(math.gcd(local, *(count for _, count in units))))}"
        )


def shard_parameters(model: Decoder, mesh: DeviceMesh) -> None:
    """Replace every parameter by a DTensor, and expose its local shard to its module."""
    views: dict[nn.Module, dict[str, View]] = {}
    for name, (placement, view) in plan_placements(model, mesh).items():
        module_name, _, local_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        parameter = module.get_parameter(local_name)
        sharded = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
        replace_parameter(module, local_name, sharded)
        views.setdefault(module, {})[local_name] = view
    for module, module_views in views.items():
        expose_local_parameters(module, **module_views)


def plan_placements(model: Decoder, mesh: DeviceMesh) -> dict[str, tuple[Placement, View]]:
    """Return the placement of each parameter and the view of it that its layer uses, by parameter name.

    A replicated parameter that is used on full rows has the same gradient on every rank. Inside the hidden state
    modules, a rank uses it on its local tokens or for its local heads only, so its gradient is a partial sum.
    """

    def partial_gradient(weight: Tensor) -> Tensor:
        return redistribute(weight, mesh, Replicate(), Replicate(), gradient=Partial())

    def partial_summand(weight: Tensor) -> Tensor:
        return partial_gradient(weight) / mesh.size()

    names = {module: name for name, module in model.named_modules()}
    placements: dict[str, tuple[Placement, View]] = {}
    for name, _ in model.named_parameters():
        has_vocabulary = name in ("embedding.weight", "output.weight")
        placements[name] = (Shard(0) if has_vocabulary else Replicate(), identity_view)
    for module in model.hidden_state_modules():
        for name, _ in module.named_parameters(prefix=names[module]):
            placements[name] = (Replicate(), partial_gradient)
        for prefix, layer in tensor_parallel_layers(module, names[module]):
            for name, _ in layer.named_parameters():
                dims = [dim for key, dim in layer.SHARD_DIMS.items() if name == key or name.startswith(f"{key}.")]
                if dims:
                    placements[f"{prefix}.{name}"] = (Shard(dims[0]), identity_view)
                elif name in layer.PARTIAL_SUMS:
                    placements[f"{prefix}.{name}"] = (Replicate(), partial_summand)
    return placements


# Forward hooks that exchange tokens between ranks. The backward of each does the reverse exchange of the gradients.


def shard_tokens(mesh: DeviceMesh, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pre-hook of a hidden state module: keep this rank's S / degree tokens of full rows [B, S, W]."""
    if not torch.is_grad_enabled():
        return args
    return tuple(_shard(arg, mesh) if isinstance(arg, Tensor) else arg for arg in args)


def _shard(h: Tensor, mesh: DeviceMesh) -> Tensor:
    assert h.shape[1] % mesh.size() == 0, "check_tensor checks the length of the rows"
    return redistribute(h, mesh, Replicate(), Shard(1))


def unshard_tokens(mesh: DeviceMesh, module: nn.Module, args: tuple[Any, ...], h: Tensor) -> Tensor:
    """Hook of a hidden state module: all-gather the tokens to full rows on every rank."""
    # A clone, since pipeline schedules detach the output of a stage in place, which fails for views.
    return redistribute(h, mesh, Shard(1), Replicate()).clone() if torch.is_grad_enabled() else h


def all_gather_tokens(mesh: DeviceMesh, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pre-hook of a tensor parallel layer: all-gather the tokens of all ranks."""
    if not torch.is_grad_enabled():
        return args
    return redistribute(args[0], mesh, Shard(1), Replicate(), gradient=Partial()), *args[1:]


def reduce_scatter_tokens(mesh: DeviceMesh, module: nn.Module, args: tuple[Any, ...], summand: Tensor) -> Tensor:
    """Hook of a tensor parallel layer: reduce-scatter the partial sums, or all-reduce them without gradients."""
    return redistribute(summand, mesh, Partial(), Shard(1) if torch.is_grad_enabled() else Replicate())
