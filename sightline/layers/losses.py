"""Training losses: functions of the log-probability of every label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sightline.batch import IGNORE, Batch
from sightline.layers.loss import add_gradient_of


class Loss(Protocol):
    """A sum over the tokens of packed rows. The training step divides it by the total `weight` of its rows.

    name  value of `--training.loss` that selects this loss
    """

    name: str

    def weight(self, batch: Batch) -> float:
        """Return the weight of these rows, counted on the CPU before the first forward: tokens, documents, pairs, ...

        Weights add up over rows, so neither gradient accumulation nor the number of ranks changes the loss.
        """

    def per_token_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Return further inputs of the loss for each token, [B, S] by name, computed from full rows.

        Context parallelism and pipelines split them like labels. If an entry of `batch.extra` has the same name, the
        loss receives it and the model does not.
        """

    def __call__(
        self, log_probs: Tensor, labels: Tensor, loss_inputs: dict[str, Tensor], group: ProcessGroup | None
    ) -> Tensor:
        """Return the sum over these tokens, a scalar that is differentiable in `log_probs`.

        log_probs    float32 [B, S], log-probability of each label; 0 for tokens without a label
        labels       int64 [B, S], -100 for tokens without a loss
        loss_inputs  result of `per_token_inputs`
        group        ranks that share these rows, for sums over full rows by a differentiable all-reduce; None if rows
                     are not sharded. The results of its ranks are added up
        """


class WeightedLoss:
    """A `Loss` whose token weights are known before the forward, so that one pass computes loss and gradients."""

    def token_weights(self, loss_inputs: dict[str, Tensor]) -> Tensor | None:
        """Return the factor of each token's -log p, float [B, S]; None stands for 1."""
        raise NotImplementedError

    def __call__(
        self, log_probs: Tensor, labels: Tensor, loss_inputs: dict[str, Tensor], group: ProcessGroup | None
    ) -> Tensor:
        weights = self.token_weights(loss_inputs)
        return -(log_probs if weights is None else log_probs * weights).sum()


class TokenMean(WeightedLoss):
    """Mean cross-entropy over all tokens with a label."""

    name = "token_mean"

    def weight(self, batch: Batch) -> float:
        return batch.valid_tokens()

    def per_token_inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {}

    def token_weights(self, loss_inputs: dict[str, Tensor]) -> None:
        return None


class DocumentMean(WeightedLoss):
    """Mean over documents of their mean cross-entropy: every document has the same weight, whatever its length.

    The parts of a document that continues in another row count as separate documents.
    """

    name = "document_mean"

    def weight(self, batch: Batch) -> float:
        return int((self._labels_per_document(batch) > 0).sum())

    def per_token_inputs(self, batch: Batch) -> dict[str, Tensor]:
        labels = self._labels_per_document(batch).gather(1, self._columns(batch))
        return {"document_share": (batch.labels != IGNORE) / labels.clamp(min=1)}

    def token_weights(self, loss_inputs: dict[str, Tensor]) -> Tensor:
        if "document_share" not in loss_inputs:
            raise ValueError(
                f"the loss {self.name} needs document_share in loss_inputs, got {sorted(loss_inputs) or 'nothing'}; "
                "pass loss_inputs=model.loss.per_token_inputs(batch) to forward, as prepare_batch does"
            )
        return loss_inputs["document_share"]

    def _columns(self, batch: Batch) -> Tensor:
        return batch.document_ids.long() + 1  # padding is -1

    def _labels_per_document(self, batch: Batch) -> Tensor:
        """Return the number of labels of each document of each row, int64 [B, documents + 1]."""
        columns = self._columns(batch)
        counts = columns.new_zeros(len(columns), int(columns.max()) + 1)
        return counts.scatter_add_(1, columns, (batch.labels != IGNORE).long())


LOSSES: tuple[Loss, ...] = (TokenMean(), DocumentMean())
"""Losses that `--training.loss` can select; `config/run.py` lists their names as its choices."""


def get_loss(name: str) -> Loss:
    """Return the loss with this name.

    Raises:
        ValueError: if the name is unknown; the message lists the known names.
    """
    for loss in LOSSES:
        if loss.name == name:
            return loss
    raise ValueError(f"training.loss is {name!r}; expected one of {', '.join(loss.name for loss in LOSSES)}")


def compute_loss(
    loss: Loss,
    token_losses: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_inputs: dict[str, Tensor],
    group: ProcessGroup | None,
) -> Tensor:
    """Return the sum of `loss` over these tokens, without materializing the logits of all tokens.

    A `WeightedLoss` takes one fused pass. Any other loss takes two: the first for the log-probabilities, the second for
    the gradients with the derivatives of the loss by the log-probabilities as token weights.

    token_losses  `linear_cross_entropy`, or its variant for a vocabulary that is sharded across ranks
    hidden        [B, S, W]
    weight        [V, W] of the output projection
    labels        int64 [B, S]
    """
    inputs = hidden.flatten(0, 1), weight, labels.flatten()
    if isinstance(loss, WeightedLoss):
        weights = loss.token_weights(loss_inputs)
        return token_losses(*inputs, token_weights=None if weights is None else weights.flatten())
    log_probs = -token_losses(*inputs, reduction="none").view(labels.shape)
    labels = labels.to(hidden.device, non_blocking=True)
    if not torch.is_grad_enabled():
        return loss(log_probs, labels, loss_inputs, group)
    value = loss(log_probs.requires_grad_(), labels, loss_inputs, group)
    (gradient,) = torch.autograd.grad(value, log_probs)
    return add_gradient_of(value.detach(), token_losses(*inputs, token_weights=-gradient.flatten()))
