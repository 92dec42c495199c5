"""Log-probabilities of the tokens of grouped responses."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sightline.batch import IGNORE
from sightline.hf.enable import is_enabled, models_in
from sightline.hf.groups import GroupedRows

CHUNK_SIZE = 512
"""Tokens whose probabilities exist at a time."""


class ResponseLogProbs(NamedTuple):
    """Values of each token of N responses, at most C tokens long; 0 where a response is shorter.

    log_probs  float32 [N, C], log-probability of the token
    entropies  float32 [N, C], entropy of the distribution that predicts it
    """

    log_probs: Tensor
    entropies: Tensor


def response_log_probs(model: nn.Module, rows: GroupedRows, temperature: float = 1.0) -> ResponseLogProbs:
    """Return the log-probability and entropy of each token of the responses, given its prompt, with gradients.

    The model computes the logits of the tokens that predict a response only. Probabilities are computed in chunks of
    tokens, and again in the backward pass.

    model        an enabled causal language model, on any device
    temperature  the logits are divided by it

    Raises:
        ValueError: if the model is not enabled.
    """
    if not is_enabled(model):
        raise ValueError(
            f"response_log_probs: {type(model).__name__} does not know documents that continue others; call "
            "sightline.hf.enable(model) first"
        )
    device = next(model.parameters()).device
    has_label = rows.labels != IGNORE
    columns: Tensor | slice = slice(None)
    inputs: dict[str, object] = {**rows.inputs(device), "use_cache": False}
    if "logits_to_keep" in inspect.signature(next(models_in(model)).forward).parameters:
        columns = has_label.any(dim=0).nonzero().flatten()
        inputs["logits_to_keep"] = columns.to(device)
    logits = model(**inputs).logits[has_label[:, columns].to(device)]
    labels = rows.labels[has_label].to(device)
    parts = [
        checkpoint(_score, chunk, label, temperature, use_reentrant=False)
        for chunk, label in zip(logits.split(CHUNK_SIZE), labels.split(CHUNK_SIZE), strict=True)
    ]
    return ResponseLogProbs(*(_scatter(rows, torch.cat(values)) for values in zip(*parts, strict=True)))


def _score(logits: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of labels [T], and the entropies [T], for logits [T, V]."""
    log_probs = (logits.float() / temperature).log_softmax(dim=-1)
    entropies = -(log_probs.exp() * log_probs).sum(dim=-1)
    return log_probs.gather(1, labels[:, None]).squeeze(1), entropies


def _scatter(rows: GroupedRows, values: Tensor) -> Tensor:
    """Return the values of labeled tokens, in the order of the rows, as [N, C]."""
    full = values.new_zeros(rows.labels.shape)
    return rows.gather(full.masked_scatter((rows.labels != IGNORE).to(values.device), values))
