"""Weights, gradients and moments shared among processes: PyTorch's FSDP2, over one axis or copied over a second."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from sightline.layers.moe import Experts
from sightline.parallel.mesh import Mesh


def apply_shard(model: nn.Module, mesh: Mesh, *, dtype: str) -> None:
    """Share every parameter among the processes of `weights`, and keep them equal over `replicate`.

    A layer's weights are gathered when it runs and dropped behind it; what belongs to no layer is gathered once a
    step. The experts of a layer lie on `expert` already and are shared among `expert_weights`. With bfloat16 the
    weights travel and compute in it; gradients add up in float32. Gradients of processes are added, not averaged: the
    loss is a sum that has been divided by the tokens of all of them.

    Under a pipeline the weights stay gathered between microbatches: gathering them for each would cost more than it
    saves.
    """
    reshard = mesh.size("pipeline") == 1
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)  # positions and masks are no activations
    if dtype == "bfloat16":
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    offload = CPUOffloadPolicy() if mesh.parallel.offload else OffloadPolicy()

    def share(module: nn.Module, over: DeviceMesh, reshard: bool) -> None:
        fully_shard(module, mesh=over, reshard_after_forward=reshard, mp_policy=precision, offload_policy=offload)

    if mesh.size("expert") > 1:
        for module in model.modules():
            if isinstance(module, Experts):
                share(module, _with_copies(mesh, "expert_weights"), reshard)
    for layer in layers_of(model):
        share(layer, _with_copies(mesh, "weights"), reshard)
    share(model, _with_copies(mesh, "weights"), False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums, and here a sum is what is meant


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """What stands in lists of layers: the decoder's, an encoder's."""
    for module in model.modules():
        if isinstance(module, nn.ModuleDict | nn.ModuleList):
            yield from module.values() if isinstance(module, nn.ModuleDict) else module


def _with_copies(mesh: Mesh, axis: str) -> DeviceMesh:
    return mesh[("replicate", axis)] if mesh.size("replicate") > 1 else mesh[axis]
