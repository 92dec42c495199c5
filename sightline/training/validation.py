"""Loss on rows that are not trained on."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sightline.batch import Batch
from sightline.data import Tokenizer
from sightline.parallel.parallel_model import ParallelModel
from sightline.training.step import prepare_batch


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
        loss += model.evaluate(model.own_tokens(prepare_batch(model, batch, tokenizer, "cpu")))
        weight += model.loss.weight(batch)
    model.train()
    mesh.sum(mesh.sum(loss, "loss"), "pipeline")
    return loss.item() / (float(mesh.sum(weight, "data")) or 1.0)
