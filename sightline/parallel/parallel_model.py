"""A model as one of many processes holds it: what a step, a validation and a checkpoint need of it."""

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
"""What a model's forward takes, by name: tokens, labels, positions, attention_masks and the batch's extra."""


class ParallelModel:
    """The parts of a model that this process has, run as the whole.

    mesh    this process's place
    whole   the whole model, without memory for its weights where others hold some of them: it makes the masks and
            knows the counts
    stages  this process's parts, whose parameters keep the names they have in the whole
    dtype   precision of forward and backward
    """

    def __init__(self, mesh: Mesh, full_model: Decoder, stages: list[Decoder], *, dtype: str = "float32") -> None:
        self.mesh, self.full_model, self.stages, self.dtype = mesh, full_model, stages, dtype

    @property
    def attention_kernels(self) -> dict[str, str]:
        """By mask, the attention kernel that this process's last forward used and why."""
        return {name: kernel for stage in self.stages for name, kernel in stage.attention_kernels.items()}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of this process, a tied weight once."""
        for stage in self.stages:
            yield from stage.named_parameters()

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Those of this process, in the same order."""
        for stage in self.stages:
            yield from stage.named_modules()

    def state_dict(self) -> dict[str, Tensor]:
        """Parameters and buffers of this process, as torch.distributed.checkpoint writes and reads them."""
        return {name: value for stage in self.stages for name, value in stage.state_dict().items()}

    def train(self, mode: bool = True) -> None:
        for stage in self.stages:
            stage.train(mode)

    def rows_per_call(self, rows: int, micro_batch_size: int) -> int:
        """How many of this process's rows a `forward_backward` takes; a pipeline cuts them up by itself."""
        return micro_batch_size

    def local_inputs(self, inputs: Inputs) -> Inputs:
        """From whole rows on the CPU to what this process computes of them, on its device."""
        sharded = isinstance(self.stages[0], FSDPModule)
        return to_device(shard_inputs(inputs, self.full_model, self.mesh), self.mesh.device, labels=sharded)

    def forward_backward(self, inputs: Inputs, scale: float, *, last: bool = True) -> Tensor:
        """Add the gradients of scale * the sum of the token losses; returns that number, of this process's tokens.

        last  whether this is the step's last call: only then do the processes add their gradients up
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
        """The sum of the losses of this process's tokens."""
        (model,) = self.stages
        with self.autocast():
            loss = model(**inputs)
        reshard(model)
        return loss

    def autocast(self) -> torch.autocast:
        """bfloat16 where the run wants it; in float32 it does nothing."""
        return torch.autocast(self.mesh.device.type, dtype=torch.bfloat16, enabled=self.dtype == "bfloat16")

    @property
    def generation_model(self) -> Any:
        """What `generate` takes as the model. All processes generate the same text together."""
        return self.stages[0]

    def finish_step(self) -> dict[str, Tensor]:
        """The stages' own `finish_step`, by the tokens of all processes; scalars of all layers, wherever they lie."""
        mesh = self.mesh
        told: dict[str, Tensor] = {}
        for stage in self.stages:
            told |= stage.finish_step(lambda total: mesh.all_reduce(total, "loss"))
        names = [f"expert_load/{name}" for name in routers_of(self.full_model)]
        if mesh.size("pipeline") == 1 or not names:
            return told
        nothing = torch.zeros((), device=mesh.device)
        loads = torch.stack([told.get(name, nothing) for name in names])
        return dict(zip(names, mesh.all_reduce(loads, "pipeline"), strict=True))

    @property
    def loss(self) -> Loss:
        return self.full_model.loss

    def get_attention_masks(self, batch: Any, tokenizer: object = None) -> Masks:
        return self.full_model.get_attention_masks(batch, tokenizer)


def reshard(stage: nn.Module) -> None:
    """Drop the weights that FSDP has gathered: it does so by itself behind a backward, and here none follows."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def single_process_model(model: Decoder, *, dtype: str = "float32") -> ParallelModel:
    """A model that is whole and alone."""
    return ParallelModel(Mesh(ParallelConfig(), next(model.parameters()).device), model, [model], dtype=dtype)


def to_device(inputs: Inputs, device: torch.device | str, *, labels: bool = False) -> Inputs:
    """The same on a device, but for what is read on the CPU: masks, which each stage lowers, and labels.

    labels  whether these move too. FSDP moves every tensor that a model is given, and would wait for the device
    """

    def move(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if name.endswith("labels") and not labels else value.to(device, non_blocking=True)
        return to_device(value, device) if name == "loss_inputs" else value

    return {name: move(name, value) for name, value in inputs.items()}
