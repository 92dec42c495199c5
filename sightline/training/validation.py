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
    """Mean loss over the valid tokens of all batches: long rows count as much as their tokens, not as rows.

    batches  those of this process: every process has as many, of as many rows
    """
    mesh = model.mesh
    loss = torch.zeros((), dtype=torch.float64, device=mesh.device)
    valid_tokens = torch.zeros((), dtype=torch.int64)
    model.train(False)
    for batch in batches:
        loss += model.evaluate(model.own_tokens(prepare_batch(model, batch, tokenizer, "cpu")))
        valid_tokens += batch.valid_tokens()
    model.train()
    mesh.sum(mesh.sum(loss, "loss"), "pipeline")
    return loss.item() / max(1, int(mesh.sum(valid_tokens, "data")))
