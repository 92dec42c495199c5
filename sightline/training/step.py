"""One optimizer step: prepare the batch, compute loss and gradients, clip, update. Also validation."""

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
from sightline.training.signals import StopRequest

Model = Any
"""A model of sightline.models, or a ParallelModel; Any, because nn.Module declares unknown attributes as Tensor."""


def prepare_batch(
    model: Model, batch: Batch, tokenizer: Tokenizer | None, device: torch.device | str
) -> dict[str, Any]:
    """Return the arguments of the model's forward: tokens, labels, attention_masks, positions, the batch's extra, and
    loss_inputs if its loss needs any.

    Training, validation and all tools call this function, so they have the same masks. Masks are computed on the CPU,
    where they are cheap, and stay there until they are lowered.
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
    """Sums of a step over all ranks: float64 scalars on the device."""

    loss: Tensor
    """Mean over the step's valid tokens."""
    visible_pairs: Tensor
    """Visible (query, key) pairs of all masks."""
    attention_flops: Tensor
    """Forward and backward FLOPs of the visible pairs, over all layers."""
    tokens: Tensor
    """Number of tokens, without padding."""
    padded_tokens: Tensor
    """Number of tokens, with padding."""
    stop_requests: Tensor
    """Number of ranks that have received a stop signal."""

    @classmethod
    def of_all_processes(cls, mesh: Mesh, loss: Tensor, *, stop_requested: bool, **counts: float) -> StepSums:
        """Sum over all ranks, all fields in one tensor.

        loss            loss of the local tokens; ranks that share rows have different tokens
        stop_requested  whether this rank has received a stop signal
        counts          values of the local rows by field; ranks that share rows count them once
        """
        counted = float(mesh.index("context") == 0 and mesh.index("pipeline") == 0)
        local = [*(counts[field.name] * counted for field in fields(cls)[1:-1]), float(stop_requested)]
        on_device = torch.tensor(local, dtype=torch.float64).to(mesh.device, non_blocking=True)
        sums = mesh.all_reduce(mesh.all_reduce(torch.cat([loss.double()[None], on_device]), "loss"), "pipeline")
        mesh.all_reduce(sums[-1:], "tensor")  # the other sums are equal on all tensor ranks
        return cls(*sums)

    def read(self) -> dict[str, float]:
        """Return the sums by name. Synchronizes with the device."""
        names = [field.name for field in fields(self)]
        return dict(zip(names, torch.stack([getattr(self, name) for name in names]).tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Results of one step over all ranks. The tensors stay on the device; reading one synchronizes with it."""

    sums: StepSums
    grad_norm: Tensor
    """Gradient norm before clipping, a float32 scalar."""
    model_metrics: dict[str, Tensor]
    """Scalars that the model reports, by name, such as the load of its experts."""

    @property
    def loss(self) -> Tensor:
        """Loss of the step's rows, by default the mean over their valid tokens."""
        return self.sums.loss


def train_step(
    model: ParallelModel,
    optimizer: Optimizer,
    batch: Batch,
    tokenizer: Tokenizer | None,
    *,
    micro_batch_size: int,
    max_grad_norm: float,
    stop: StopRequest | None = None,
) -> StepResult:
    """Run one optimizer step on `batch`, the local rows. The learning rate must be set in the optimizer.

    The loss is divided by the weight of the rows of all ranks (by default their valid tokens), counted before the first
    forward, so the gradient does not depend on the micro-batch size or the number of ranks. A step with a non-finite
    loss or gradient norm does not change weights and optimizer state.

    stop  the stop signals of this rank, to be counted in the step's sums
    """
    mesh = model.mesh
    optimizer.zero_grad(set_to_none=True)
    local = torch.tensor([model.loss.weight(batch), batch.valid_tokens()], dtype=torch.float64)
    weight, valid_tokens = non_zero(mesh.all_reduce(local.to(mesh.device, non_blocking=True), "data"))
    scale = (1 / weight).float()  # a tensor, so that the host does not wait for the sum
    for stage in model.stages:
        stage.aux_loss_scale = (weight / valid_tokens).float()
    loss = torch.zeros((), device=mesh.device)
    pairs, flops = 0, 0.0
    rows = model.rows_per_call(batch.shape[0], micro_batch_size)
    for first in range(0, batch.shape[0], rows):
        inputs = prepare_batch(model, batch[first : first + rows], tokenizer, "cpu")
        for name, mask in inputs["attention_masks"].items():
            visible = int(mask.visible_pairs().sum())
            pairs += visible
            flops += visible * model.full_model.flops_per_pair(name)
        loss += model.forward_backward(model.local_inputs(inputs), scale, last=first + rows >= batch.shape[0])
    grad_norm = clip_gradients((p for _, p in model.named_parameters()), max_grad_norm, mesh)
    sums = StepSums.of_all_processes(
        mesh,
        loss,
        visible_pairs=pairs,
        attention_flops=flops,
        tokens=int((batch.document_ids != PADDING).sum()),
        padded_tokens=batch.tokens.numel(),
        stop_requested=stop is not None and stop.received is not None,
    )
    optimizer.found_inf = (~(sums.loss.isfinite() & grad_norm.isfinite())).float()
    optimizer.step()
    return StepResult(sums=sums, grad_norm=grad_norm, model_metrics=model.finish_step())


@torch.no_grad()
def validate(model: ParallelModel, batches: Iterable[Batch], tokenizer: Tokenizer | None) -> float:
    """Return the loss over all batches, by default the mean over all valid tokens.

    batches  the local batches; every rank needs the same number of batches and rows
    """
    mesh = model.mesh
    loss = torch.zeros((), dtype=torch.float64, device=mesh.device)
    weight = torch.zeros((), dtype=torch.float64, device=mesh.device)
    model.train(False)
    for batch in batches:
        loss += model.evaluate(model.local_inputs(prepare_batch(model, batch, tokenizer, "cpu")))
        weight += model.loss.weight(batch)
    model.train()
    mesh.all_reduce(mesh.all_reduce(loss, "loss"), "pipeline")
    return (loss / non_zero(mesh.all_reduce(weight, "data"))).item()


def non_zero(numbers: Tensor) -> Tensor:
    """Return the numbers with each 0 replaced by 1, to divide by them."""
    return torch.where(numbers == 0, 1.0, numbers)
