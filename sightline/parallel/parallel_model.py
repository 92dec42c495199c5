"""A model sharded across ranks, with the methods that training, validation and checkpoints need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from sightline.config import ParallelConfig
from sightline.layers import Loss, routers_of
from sightline.models.decoder import Decoder, Masks
from sightline.parallel.context.apply import shard_inputs
from sightline.parallel.mesh import Mesh

Inputs = dict[str, Any]
"""Arguments of a model's forward, by name: tokens, labels, positions, attention_masks and the batch's extra."""


class ParallelModel:
    """This rank's part of a sharded model, used like the full model.

    mesh        device mesh of all parallelisms
    full_model  the full model, on the meta device if the weights are sharded: builds masks and counts FLOPs
    stages      this rank's stages; their parameters have the same names as in the full model
    dtype       precision of forward and backward
    """

    def __init__(self, mesh: Mesh, full_model: Decoder, stages: list[Decoder], *, dtype: str = "float32") -> None:
        self.mesh, self.full_model, self.stages, self.dtype = mesh, full_model, stages, dtype

    @property
    def attention_kernels(self) -> dict[str, str]:
        """Attention kernel of this rank's last forward and the reason for its choice, by mask."""
        return {name: kernel for stage in self.stages for name, kernel in stage.attention_kernels.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters of this rank's stages, a tied weight once."""
        for stage in self.stages:
            yield from stage.named_parameters()

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules of this rank's stages, in the same order."""
        for stage in self.stages:
            yield from stage.named_modules()

    def state_dict(self) -> dict[str, Tensor]:
        """Return this rank's parameters and buffers, for torch.distributed.checkpoint."""
        return {name: value for stage in self.stages for name, value in stage.state_dict().items()}

    def train(self, mode: bool = True) -> None:
        for stage in self.stages:
            stage.train(mode)

    def rows_per_call(self, rows: int, micro_batch_size: int) -> int:
        """Return the rows of one `forward_backward` call; a pipeline takes all rows and splits them itself."""
        return micro_batch_size

    def local_inputs(self, inputs: Inputs) -> Inputs:
        """Move full rows from the CPU to this rank's device, sharded by context parallelism."""
        sharded = isinstance(self.stages[0], FSDPModule)
        return to_device(shard_inputs(inputs, self.full_model, self.mesh), self.mesh.device, labels=sharded)

    def forward_backward(self, inputs: Inputs, scale: float | Tensor, *, last: bool = True) -> Tensor:
        """Accumulate the gradients of scale * (sum of the token losses); return that value for this rank's tokens.

        last  whether this is the step's last call: FSDP reduces gradients across ranks only then
        """
        (model,) = self.stages
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        with self.autocast():
            loss = model(**inputs) * scale
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, inputs: Inputs) -> Tensor:
        """Return the sum of the losses of this rank's tokens."""
        (model,) = self.stages
        with self.autocast():
            loss = model(**inputs)
        reshard(model)
        return loss

    def autocast(self) -> torch.autocast:
        """Return the autocast context of the forward: bfloat16, or disabled for a float32 run."""
        return torch.autocast(self.mesh.device.type, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16")

    @property
    def generation_model(self) -> Any:
        """The model to pass to `generate`. All ranks must call it together, and all return the same text."""
        return self.stages[0]

    def finish_step(self) -> dict[str, Tensor]:
        """Call `finish_step` of all stages with sums over ranks; return the scalars of all layers on every rank."""
        mesh = self.mesh
        scalars: dict[str, Tensor] = {}
        for stage in self.stages:
            scalars |= stage.finish_step(lambda total: mesh.all_reduce(total, "loss"))
        names = [f"expert_load/{name}" for name in routers_of(self.full_model)]
        if mesh.size("pipeline") == 1 or not names:
            return scalars
        zero = torch.zeros((), device=mesh.device)
        loads = torch.stack([scalars.get(name, zero) for name in names])
        return dict(zip(names, mesh.all_reduce(loads, "pipeline"), strict=True))

    @property
    def loss(self) -> Loss:
        return self.full_model.loss

    def get_attention_masks(self, batch: Any, tokenizer: object = None) -> Masks:
        return self.full_model.get_attention_masks(batch, tokenizer)


def reshard(stage: nn.Module) -> None:
    """Free the weights that FSDP has gathered. FSDP does so after a backward, but without gradients there is none."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def single_process_model(model: Decoder, *, dtype: str = "float32") -> ParallelModel:
    """Wrap an unsharded model for training in a single process."""
    return ParallelModel(Mesh(ParallelConfig(), next(model.parameters()).device), model, [model], dtype=dtype)


def to_device(inputs: Inputs, device: torch.device | str, *, labels: bool = False) -> Inputs:
    """Move the inputs to a device, except masks, whose kernel inputs are built on the CPU, and labels.

    labels  also move labels: FSDP moves every tensor argument of a model anyway, and would wait for the device
    """

    def move(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if name.endswith("labels") and not labels else value.to(device, non_blocking=True)
        return to_device(value, device) if name == "loss_inputs" else value

    return {name: move(name, value) for name, value in inputs.items()}
