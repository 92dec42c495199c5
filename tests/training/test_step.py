"""prepare_batch and train_step, compared with plain PyTorch."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from sightline import Batch
from sightline.config import OptimizerConfig
from sightline.layers import get_loss
from sightline.layers.losses import WeightedLoss
from sightline.models import build_model, config_of
from sightline.parallel.parallel_model import single_process_model
from sightline.training.optimizer import build_optimizer
from sightline.training.step import prepare_batch, train_step, validate
from tests.support.small_runs import MODEL

CPU = torch.device("cpu")
ROWS = [[[7, 3, 9, 200, 4, 31, 8, 2]], [[5, 6], [11, 12, 13, 14]], [[1], [2, 3, 4, 5, 6]], [[9, 9]]]
"""Document lengths of each row of 8 tokens."""


def build(seed: int = 0):
    torch.manual_seed(seed)
    return build_model(MODEL, attention_backend="sdpa")


def uneven_batch() -> Batch:
    """4 rows with 7, 4, 4 and 1 labels, so that rows must not have equal weight."""
    rows = [Batch.from_documents(documents, length=8) for documents in ROWS]
    assert [row.valid_tokens() for row in rows] == [7, 4, 4, 1]
    names = ("tokens", "labels", "document_ids", "positions")
    return Batch(**{name: torch.cat([getattr(row, name) for row in rows]) for name in names})


@torch.no_grad()
def mean_loss_of_documents(model) -> float:
    """Reference: F.cross_entropy over full logits of each document alone, averaged over all predicted tokens."""
    total, count = 0.0, 0
    for document in (document for row in ROWS for document in row):
        if len(document) > 1:
            alone = prepare_batch(model, Batch.from_documents([document], length=len(document)), None, CPU)
            labels = alone.pop("labels")
            logits = model(**alone)
            total += float(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"))
            count += len(document) - 1
    return total / count


def step(model, batch, micro_batch_size, max_grad_norm=1e9, dtype="float32"):
    optimizer = build_optimizer(model, OptimizerConfig())
    alone = single_process_model(model, dtype=dtype)
    return optimizer, train_step(
        alone, optimizer, batch, None, micro_batch_size=micro_batch_size, max_grad_norm=max_grad_norm
    )


def test_prepare_batch_returns_all_arguments_of_forward() -> None:
    model = build()
    batch = uneven_batch()
    batch.extra["reward"] = torch.arange(4)
    inputs = prepare_batch(model, batch, None, CPU)
    assert set(inputs) == {"tokens", "labels", "positions", "attention_masks", "reward"}
    assert torch.equal(inputs["attention_masks"]["attention"].to_dense(), model.get_attention_masks(batch).to_dense())
    assert torch.equal(inputs["labels"], batch.labels)


def test_loss_is_the_mean_over_valid_tokens() -> None:
    model = build()
    expected = mean_loss_of_documents(model)
    _, result = step(model, uneven_batch(), micro_batch_size=1)
    assert result.loss.item() == pytest.approx(expected, rel=1e-6)


def test_validation_is_the_mean_over_valid_tokens_too() -> None:
    model = build()
    batch = uneven_batch()
    assert validate(single_process_model(model), [batch[:1], batch[1:]], None) == pytest.approx(
        mean_loss_of_documents(model), rel=1e-6
    )
    assert model.training


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_accumulated_gradients_equal_those_of_one_batch(micro_batch_size) -> None:
    whole, parts = build(), build()
    _, expected = step(whole, uneven_batch(), micro_batch_size=4)
    _, result = step(parts, uneven_batch(), micro_batch_size=micro_batch_size)
    assert result.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert result.grad_norm.item() == pytest.approx(expected.grad_norm.item(), rel=1e-6)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert a.grad is not None and a.grad.abs().max() > 0, name
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_a_mean_of_means_would_differ() -> None:
    """The rows of the batch differ enough for a wrong weighting to change the loss."""
    model = build()
    batch = uneven_batch()
    means = [step(build(), batch[row : row + 1], 1)[1].loss.item() for row in range(4)]
    assert abs(sum(means) / 4 - mean_loss_of_documents(model)) > 1e-3


def test_clipping_scales_to_the_norm() -> None:
    model = build()
    _, result = step(model, uneven_batch(), 4, max_grad_norm=0.01)
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert result.grad_norm.item() > 0.1
    assert norm == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_step_changes_nothing(bad) -> None:
    model = build()
    batch = uneven_batch()
    optimizer, _ = step(model, batch, 4)
    with torch.no_grad():
        model.norm.weight[3] = bad
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    states = {name: optimizer.state[p]["exp_avg"].clone() for name, p in model.named_parameters()}
    alone = single_process_model(model)
    result = train_step(alone, optimizer, batch, None, micro_batch_size=4, max_grad_norm=1.0)
    assert not (math.isfinite(result.loss.item()) and math.isfinite(result.grad_norm.item()))
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(optimizer.state[p]["exp_avg"], states[name])
        assert optimizer.state[p]["step"] == 1
    with torch.no_grad():
        model.norm.weight[3] = 1.0
    assert math.isfinite(train_step(
        alone, optimizer, batch, None, micro_batch_size=4, max_grad_norm=1.0
    ).loss.item())  # fmt: skip
    assert optimizer.state[model.norm.weight]["step"] == 2, "a finite step after it counts again"


def test_work_is_counted_from_the_mask() -> None:
    batch = Batch.from_documents([[1, 2, 3], [4, 5, 6, 7]], length=8)
    model = build()
    _, result = step(model, batch, 1)
    numbers = result.sums.read()
    assert (numbers["tokens"], numbers["padded_tokens"]) == (7, 8)
    assert numbers["visible_pairs"] == 6 + 10  # 1 + 2 + 3, 1 + 2 + 3 + 4, and nothing for the padding
    assert numbers["attention_flops"] == 16 * model.flops_per_pair("attention")


@pytest.mark.parametrize(
    ("family", "option", "off", "on"),
    [("qwen3-debug-moe", "aux_loss_coef", 0.0, 0.1), ("deepseek_v3-debug", "mtp_loss_weight", None, 0.3)],
)
def test_auxiliary_losses_are_means_over_tokens_whatever_the_loss_divides_by(family, option, off, on) -> None:
    def gradients(loss: str, value: float | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = build_model(dataclasses.replace(config_of(family), **{option: value}))
        model.loss = get_loss(loss)
        step(model, uneven_batch(), micro_batch_size=1)
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    added = []
    for loss in ("token_mean", "document_mean"):
        without, both = gradients(loss, off), gradients(loss, on)
        added.append({name: both[name] - gradient for name, gradient in without.items()})
    assert max(float(gradient.abs().max()) for gradient in added[0].values()) > 1e-3
    for name, gradient in added[0].items():
        torch.testing.assert_close(added[1][name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_an_extra_that_the_loss_takes_does_not_reach_the_model() -> None:
    class Masked(WeightedLoss):
        name = "masked"

        def weight(self, batch: Batch) -> float:
            return float(batch.extra["wanted"].sum())

        def per_token_inputs(self, batch: Batch) -> dict[str, torch.Tensor]:
            return {"wanted": batch.extra["wanted"]}

        def token_weights(self, facts: dict[str, torch.Tensor]) -> torch.Tensor:
            return facts["wanted"]

    model, batch = build(), uneven_batch()
    expected = step(build(), batch[1:3], micro_batch_size=1)[1].loss.item()
    model.loss = Masked()
    batch.extra["wanted"] = torch.tensor([0.0, 1.0, 1.0, 0.0])[:, None] * (batch.labels != -100)
    assert step(model, batch, micro_batch_size=2)[1].loss.item() == pytest.approx(expected, rel=1e-6)


def test_a_batch_without_labels_does_not_divide_by_zero() -> None:
    _, result = step(build(), Batch.from_documents([[1], [2], [3]], length=2), 2)
    assert result.loss.item() == 0.0


def test_bfloat16_is_autocast() -> None:
    model = build()
    expected = mean_loss_of_documents(model)
    _, result = step(model, uneven_batch(), 4, dtype="bfloat16")
    assert result.loss.item() == pytest.approx(expected, rel=0.02)
    assert result.loss.item() != pytest.approx(expected, rel=1e-6)
    assert all(p.dtype == torch.float32 for p in model.parameters())
