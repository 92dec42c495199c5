"""Sharded weights, gradients and optimizer state: PyTorch's FSDP2, or HSDP if there are replicas."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from sightline.layers.moe import Experts
from sightline.parallel.mesh import Mesh


def apply_shard(model: nn.Module, mesh: Mesh, *, dtype: str) -> None:
    """Shard every parameter across the axis `weights`, replicated over `replicate`, in place.

    A layer's weights are all-gathered before its forward and freed after it; parameters outside of layers are gathered
    once per step. Experts are already sharded across `expert`, and FSDP shards them further across `expert_weights`.
    With bfloat16, weights are gathered and used in bfloat16, and gradients are reduced in float32. Gradients are summed
    over ranks, not averaged, since each rank's loss is a sum divided by the number of tokens of all ranks.

    In a pipeline, the weights stay gathered between micro-batches: gathering them for each costs more than it saves.
    """
    reshard = mesh.size("pipeline") == 1
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)  # positions and masks must keep their dtype
    if dtype == "bfloat16":
        precision = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    offload = CPUOffloadPolicy() if mesh.parallel.offload else OffloadPolicy()

    def shard(module: nn.Module, over: DeviceMesh, reshard: bool) -> None:
        fully_shard(module, mesh=over, reshard_after_forward=reshard, mp_policy=precision, offload_policy=offload)

    if mesh.size("expert") > 1:
        for module in model.modules():
            if isinstance(module, Experts):
                shard(module, _with_replicas(mesh, "expert_weights"), reshard)
    for layer in layers_of(model):
        shard(layer, _with_replicas(mesh, "weights"), reshard)
    shard(model, _with_replicas(mesh, "weights"), False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums; none is needed


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers in all module lists: those of the decoder and of an encoder."""
    for module in model.modules():
        if isinstance(module, nn.ModuleDict | nn.ModuleList):
            yield from module.values() if isinstance(module, nn.ModuleDict) else module


def _with_replicas(mesh: Mesh, axis: str) -> DeviceMesh:
    return mesh[("replicate", axis)] if mesh.size("replicate") > 1 else mesh[axis]
