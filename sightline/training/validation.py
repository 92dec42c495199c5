"""Loss on rows that are not trained on."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from sightline.batch import Batch
from sightline.data import Tokenizer
from sightline.training.step import Model, autocast, prepare_batch


@torch.no_grad()
def validate(
    model: Model, batches: Iterable[Batch], tokenizer: Tokenizer | None, device: torch.device, dtype: str = "float32"
) -> float:
    """Mean loss over the valid tokens of all batches: long rows count as much as their tokens, not as rows."""
    loss = torch.zeros((), device=device)
    valid_tokens = 0
    model.eval()
    for batch in batches:
        with autocast(device, dtype):
            loss += model(**prepare_batch(model, batch, tokenizer, device))
        valid_tokens += batch.valid_tokens()
    model.train()
    return loss.item() / max(1, valid_tokens)
