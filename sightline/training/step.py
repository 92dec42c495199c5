"""One optimizer step: what the model takes, the loss over all valid tokens, clipping, the update. And validation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from sightline.batch import PADDING, Batch
from sightline.data import Tokenizer
from sightline.masks import named_masks
from sightline.parallel.gradients import clip_gradients
from sightline.parallel.mesh import Mesh
from sightline.parallel.parallel_model import ParallelModel, to_device
from sightline.training.optimizer import Optimizer

Model = Any
"""A model of sightline.models, or a ParallelModel. It has no type of its own: every family is just an nn.Module with
the same few methods, and nn.Module declares whatever it does not know a Tensor."""


def prepare_batch(
    model: Model, batch: Batch, tokenizer: Tokenizer | None, device: torch.device | str
) -> dict[str, Any]:
    """What the model's forward takes, by name: tokens, labels, attention_masks, positions and the batch's extra, and
    loss_inputs where its loss needs any.

    Training, validation and every tool come through here, so none of them can have another mask than the others.
    The masks are made on the CPU, where their few integers cost next to nothing, and stay there until they are lowered.
    """
    loss_inputs = model.loss.per_token_inputs(batch)
    inputs = {
        "tokens": batch.tokens,
        "labels": batch.labels,
        "positions": batch.positions,
        "attention_masks": named_masks(model.get_attention_masks(batch, tokenizer)),
        **{name: value for name, value in batch.extra.items() if name not in loss_inputs},
        **({"loss_inputs": loss_inputs} if loss_inputs else {}),
    }
    return to_device(inputs, device)


@dataclass(frozen=True)
class StepSums:
    """What a step adds up over all processes: float64 scalars on the device."""

    loss: Tensor
    """Mean over the step's valid tokens."""
    visible_pairs: Tensor
    """(query, key) pairs that all masks show."""
    attention_flops: Tensor
    """Forward and backward, of those pairs over all layers."""
    tokens: Tensor
    """Those that are no padding."""
    padded_tokens: Tensor
    """Those of the rows, padding included."""

    @classmethod
    def of_all_processes(cls, mesh: Mesh, loss: Tensor, **counts: float) -> StepSums:
        """Add up in one collective.

        loss    of this process's tokens: processes that share rows have others
        counts  of this process's rows, by field: counted once among the processes that share them
        """
        counted = float(mesh.index("context") == 0 and mesh.index("pipeline") == 0)
        own = torch.tensor([counts[field.name] * counted for field in fields(cls)[1:]], dtype=torch.float64)
        sums = torch.cat([loss.double()[None], own.to(mesh.device, non_blocking=True)])
        return cls(*mesh.all_reduce(mesh.all_reduce(sums, "loss"), "pipeline"))

    def read(self) -> dict[str, float]:
        """The numbers by name. Waits for the device."""
        names = [field.name for field in fields(self)]
        return dict(zip(names, torch.stack([getattr(self, name) for name in names]).tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Numbers of one step, over all processes. The tensors stay on the device: reading one waits for it."""

    sums: StepSums
    grad_norm: Tensor
    """float32 scalar: before clipping."""
    model_metrics: dict[str, Tensor]
    """Scalars that the model tells of the step, by name: the load of its experts, ..."""

    @property
    def loss(self) -> Tensor:
        """The run's loss of the step's rows: by default the mean over their valid tokens."""
        return self.sums.loss


def train_step(
    model: ParallelModel,
    optimizer: Optimizer,
    batch: Batch,
    tokenizer: Tokenizer | None,
    *,
    micro_batch_size: int,
    max_grad_norm: float,
) -> StepResult:
    """Take one step on all rows of `batch`, those of this process. The optimizer has its learning rate.

    The loss divides by the weight of all processes' rows (by default their valid tokens), counted before the first
    forward, so the gradient does not depend on how the rows are cut into micro-batches or dealt out to processes. A
    step whose loss or gradient norm is not finite leaves weights and moments untouched.
    """
    mesh = model.mesh
    optimizer.zero_grad(set_to_none=True)
    own = torch.tensor([model.loss.weight(batch), batch.valid_tokens()], dtype=torch.float64)
    weight, valid_tokens = (number or 1.0 for number in mesh.all_reduce(own, "data").tolist())
    for stage in model.stages:
        stage.aux_loss_scale = weight / valid_tokens
    loss = torch.zeros((), device=mesh.device)
    pairs, flops = 0, 0.0
    rows = model.rows_per_call(batch.shape[0], micro_batch_size)
    for first in range(0, batch.shape[0], rows):
        inputs = prepare_batch(model, batch[first : first + rows], tokenizer, "cpu")
        for name, mask in inputs["attention_masks"].items():
            visible = int(mask.visible_pairs().sum())
            pairs += visible
            flops += visible * model.full_model.flops_per_pair(name)
        loss += model.forward_backward(model.local_inputs(inputs), 1 / weight, last=first + rows >= batch.shape[0])
    grad_norm = clip_gradients((p for _, p in model.named_parameters()), max_grad_norm, mesh)
    sums = StepSums.of_all_processes(
        mesh,
        loss,
        visible_pairs=pairs,
        attention_flops=flops,
        tokens=int((batch.document_ids != PADDING).sum()),
        padded_tokens=batch.tokens.numel(),
    )
    optimizer.found_inf = (~(sums.loss.isfinite() & grad_norm.isfinite())).float()
    optimizer.step()
    return StepResult(sums=sums, grad_norm=grad_norm, model_metrics=model.finish_step())


@torch.no_grad()
def validate(model: ParallelModel, batches: Iterable[Batch], tokenizer: Tokenizer | None) -> float:
    """The loss over all batches, by default the mean over valid tokens: long rows count as much as their tokens.

    batches  those of this process: every process has as many, of as many rows
    """
    mesh = model.mesh
    loss = torch.zeros((), dtype=torch.float64, device=mesh.device)
    weight = torch.zeros((), dtype=torch.float64)
    model.train(False)
    for batch in batches:
        loss += model.evaluate(model.local_inputs(prepare_batch(model, batch, tokenizer, "cpu")))
        weight += model.loss.weight(batch)
    model.train()
    mesh.all_reduce(mesh.all_reduce(loss, "loss"), "pipeline")
    return loss.item() / (float(mesh.all_reduce(weight, "data")) or 1.0)
