"""What a model is trained to make small: each loss receives the log-probability of every label."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from sightline.batch import IGNORE, Batch
from sightline.layers.loss import with_gradient_of


class Loss(Protocol):
    """A sum over the tokens of packed rows, and the weight that the sum over all rows of a step is divided by.

    name  its value of `--training.loss`
    """

    name: str

    def weight(self, batch: Batch) -> float:
        """The weight of these rows, counted on the CPU before the first forward: tokens, documents, pairs, ...

        Weights add up over rows, so neither accumulation nor the number of processes changes the loss.
        """

    def per_token_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What else the loss needs to know of each token, [B, S] by name, made from whole rows.

        Context parallelism and pipelines split it like labels. An entry of `batch.extra` that is named here goes to the
        loss and not to the model.
        """

    def __call__(
        self, log_probs: Tensor, labels: Tensor, loss_inputs: dict[str, Tensor], group: ProcessGroup | None
    ) -> Tensor:
        """The sum over these tokens, a scalar that is differentiable in `log_probs`.

        log_probs  float32 [B, S], of each label; 0 where there is none
        labels     int64 [B, S], -100 where no loss is wanted
        facts      from `per_token_inputs`
        group      the processes that have the other tokens of the same rows, for sums over whole rows by a
                   differentiable all-reduce; None where rows are whole. What its processes return is added up
        """


class WeightedLoss:
    """A `Loss` whose tokens have weights known before the forward, so that one pass computes loss and gradients."""

    def token_weights(self, loss_inputs: dict[str, Tensor]) -> Tensor | None:
        """float [B, S], factor of each token's -log p; None is 1 for all."""
        raise NotImplementedError

    def __call__(
        self, log_probs: Tensor, labels: Tensor, loss_inputs: dict[str, Tensor], group: ProcessGroup | None
    ) -> Tensor:
        weights = self.token_weights(loss_inputs)
        return -(log_probs if weights is None else log_probs * weights).sum()


class TokenMean(WeightedLoss):
    """Cross-entropy, the mean over all tokens with a label."""

    name = "token_mean"

    def weight(self, batch: Batch) -> float:
        return batch.valid_tokens()

    def per_token_inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {}

    def token_weights(self, loss_inputs: dict[str, Tensor]) -> None:
        return None


class DocumentMean(WeightedLoss):
    """Mean over documents of the mean cross-entropy of their tokens: every document counts the same, however long.

    A document that goes on in another row is another document there.
    """

    name = "document_mean"

    def weight(self, batch: Batch) -> float:
        return int((self._labels_of_documents(batch) > 0).sum())

    def per_token_inputs(self, batch: Batch) -> dict[str, Tensor]:
        labels = self._labels_of_documents(batch).gather(1, self._columns(batch))
        return {"document_share": (batch.labels != IGNORE) / labels.clamp(min=1)}

    def token_weights(self, loss_inputs: dict[str, Tensor]) -> Tensor:
        if "document_share" not in loss_inputs:
            raise ValueError(
                f"the loss {self.name} needs document_share of each token, got {sorted(loss_inputs) or 'nothing'}; give "
                "forward loss_inputs=model.loss.per_token_inputs(batch), as prepare_batch does"
            )
        return loss_inputs["document_share"]

    def _columns(self, batch: Batch) -> Tensor:
        return batch.document_ids.long() + 1  # padding is -1

    def _labels_of_documents(self, batch: Batch) -> Tensor:
        """Number of labels of each document of each row, int64 [B, documents + 1]."""
        columns = self._columns(batch)
        counts = columns.new_zeros(len(columns), int(columns.max()) + 1)
        return counts.scatter_add_(1, columns, (batch.labels != IGNORE).long())


LOSSES: tuple[Loss, ...] = (TokenMean(), DocumentMean())
"""Those that `--training.loss` names; `config/run.py` lists the names as its choices."""


def get_loss(name: str) -> Loss:
    """The loss of that name; ValueError for an unknown one, naming those there are."""
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
    """The loss's sum over these tokens, without the logits of all tokens.

    A `WeightedLoss` is one fused pass. Any other is two: the log-probabilities, and once the loss has said how its sum
    changes with each of them, the pass that computes the gradients with these numbers as weights.

    token_losses  `linear_cross_entropy`, or the form of it for a shared vocabulary
    hidden        [B, S, W]
    weight        [V, W], of the output projection
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
    return with_gradient_of(value.detach(), token_losses(*inputs, token_weights=-gradient.flatten()))
