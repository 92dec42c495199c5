"""The losses of `--training.loss`, and losses that are not a `WeightedLoss`."""

from typing import get_args, get_type_hints

import pytest
import torch
import torch.nn.functional as F

from sightline import Batch
from sightline.config import TrainingConfig
from sightline.layers import LOSSES, compute_loss, get_loss, linear_cross_entropy
from sightline.models import build_skeleton
from sightline.models.deepseek_v3 import shift_for_mtp
from sightline.training.step import prepare_batch

W, V = 16, 41
DOCUMENTS = [[1, 2, 3, 4, 5], [6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16, 17]]
"""Two rows of 10: documents of 5, 2, 1 and 2 tokens, the last of which continues with 4 in the next row; 3; padding."""


def test_option_lists_all_losses() -> None:
    assert get_args(get_type_hints(TrainingConfig)["loss"]) == tuple(one.name for one in LOSSES)
    assert TrainingConfig().loss == LOSSES[0].name == "token_mean"
    with pytest.raises(ValueError, match=r"training\.loss is 'mean'; expected one of token_mean, document_mean"):
        get_loss("mean")


def test_document_mean_weights_documents_equally() -> None:
    batch = Batch.from_documents(DOCUMENTS, length=10)
    loss = get_loss("document_mean")
    assert loss.weight(batch) == 5  # they have 4, 1, 2, 3 and 2 labels; a document of one token has no label
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 10, W, requires_grad=True), torch.randn(V, W)
    found = compute_loss(loss, linear_cross_entropy, hidden, weight, batch.labels, loss.per_token_inputs(batch), None)
    each = F.cross_entropy((hidden @ weight.t()).mT, batch.labels, ignore_index=-100, reduction="none")
    runs = [(0, 0, 4), (0, 5, 6), (0, 8, 10), (1, 0, 3), (1, 4, 6)]
    expected = sum(each[row, start:stop].mean() for row, start, stop in runs)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (found, expected)), atol=1e-6, rtol=1e-5)


def test_missing_loss_inputs_are_an_error() -> None:
    with pytest.raises(ValueError, match="document_mean needs document_share in loss_inputs, got nothing; pass"):
        compute_loss(get_loss("document_mean"), linear_cross_entropy, *(torch.zeros(1, 2, 3),) * 3, {}, None)


@pytest.mark.parametrize("name", [one.name for one in LOSSES])
def test_one_pass_equals_two_passes(name: str) -> None:
    """A loss that is not a `WeightedLoss` takes a second pass with its derivatives as token weights."""
    batch, loss = Batch.from_documents(DOCUMENTS, length=10), get_loss(name)
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 10, W, requires_grad=True), torch.randn(V, W, requires_grad=True)
    inputs = hidden, weight, batch.labels, loss.per_token_inputs(batch), None
    results = []
    for one in (loss, lambda *args: loss(*args)):
        value = compute_loss(one, linear_cross_entropy, *inputs)  # type: ignore[arg-type]
        results.append([value, *torch.autograd.grad(value, (hidden, weight))])
        with torch.no_grad():
            assert torch.equal(compute_loss(one, linear_cross_entropy, *inputs), value)  # type: ignore[arg-type]
    for fused, general in zip(*results, strict=True):
        torch.testing.assert_close(general, fused, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [one.name for one in LOSSES])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_model_and_loss_do_not_synchronize(device: str, name: str) -> None:
    model = build_skeleton("llama3-debug", attention_backend="reference")
    model.loss = get_loss(name)
    batch = Batch.from_documents(DOCUMENTS, length=10)
    inputs = prepare_batch(model, batch, None, "meta")
    model(**inputs | {"labels": batch.labels.to(device)}).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_mtp_shift_does_not_synchronize(device: str) -> None:
    batch = Batch.from_documents(DOCUMENTS, length=10)
    next_tokens, next_labels = shift_for_mtp(batch.tokens.to("meta"), batch.labels.to(device))
    assert next_tokens.device.type == "meta" and next_labels.device.type == device
