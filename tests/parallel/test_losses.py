"""Custom losses on meshes: `document_mean`, and a preference loss that needs sums over full rows."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from sightline import Batch
from sightline.config import OptimizerConfig, ParallelConfig, Run, TrainingConfig
from sightline.layers import get_loss
from sightline.models import config_of
from sightline.parallel.apply import build_parallel
from sightline.parallel.mesh import Mesh
from sightline.training.optimizer import build_optimizer
from sightline.training.step import train_step, validate
from tests.support.processes import run_on_ranks

CPU = torch.device("cpu")
PAIRS, LENGTH, BETA = 2, 32, 0.5
MODELS = {
    "llama3": config_of("llama3-debug"),
    "routed": dataclasses.replace(config_of("qwen3-debug-moe"), aux_loss_coef=0.1),
}


class SumOverGroup(torch.autograd.Function):
    """All-reduce in the forward and in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        total = grad.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class Preference:
    """Mean over pairs of -log sigmoid(BETA * (log p(chosen document) - log p(rejected document)))."""

    name = "preference"

    def weight(self, batch: Batch) -> float:
        return len(batch.tokens) * PAIRS

    def per_token_inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch.extra[name] for name in ("pair", "side")}

    def __call__(self, log_probs: Tensor, labels: Tensor, inputs: dict[str, Tensor], group: Any) -> Tensor:
        assert not log_probs[labels == -100].any()
        margins = log_probs.new_zeros(len(log_probs), PAIRS).scatter_add(1, inputs["pair"], inputs["side"] * log_probs)
        if group is None:
            return -F.logsigmoid(BETA * margins).sum()
        return -F.logsigmoid(BETA * SumOverGroup.apply(margins, group)).sum() / group.size()


def rows() -> Batch:
    """Return four rows with two pairs of a chosen and a rejected document each; the lengths differ between rows."""
    generator = torch.Generator().manual_seed(1)
    lengths = [[7, 5, 9, 4], [3, 12, 2, 8], [6, 6, 10, 10], [4, 3, 5, 2]]
    packed = [
        Batch.from_documents([torch.randint(500, (n,), generator=generator).tolist() for n in row], length=LENGTH)
        for row in lengths
    ]
    fields = ("tokens", "labels", "document_ids", "positions")
    batch = Batch(**{name: torch.cat([getattr(row, name) for row in packed]) for name in fields})
    ids = batch.document_ids.clamp(min=0).long()
    side = torch.where(batch.document_ids < 0, 0, 1 - 2 * (ids % 2)).float()
    return dataclasses.replace(batch, extra={"pair": ids // 2, "side": side})


def learn(rank: int, name: str, loss: str, degrees: dict[str, int]) -> dict[str, Tensor]:
    """Return loss, gradient norm and full gradients of a step, and the validation loss of the same rows."""
    run = Run(
        model=MODELS[name],
        parallel=ParallelConfig(**degrees),  # type: ignore[arg-type]
        training=TrainingConfig(sequence_length=LENGTH, global_batch_size=4, micro_batch_size=1),
    )
    torch.manual_seed(0)
    mesh = Mesh(run.parallel, CPU)
    model = build_parallel(run.model, run.training, mesh)
    for part in (model.full_model, *model.stages):
        part.loss = Preference() if loss == "preference" else get_loss(loss)
    share = len(rows().tokens) // mesh.size("data")
    batch = rows()[mesh.index("data") * share :][:share]
    if loss != "preference":
        batch = dataclasses.replace(batch, extra={})
    validated = torch.tensor(validate(model, [batch], None))
    optimizer = build_optimizer(model, OptimizerConfig())
    step = train_step(model, optimizer, batch, None, micro_batch_size=1, max_grad_norm=float("inf"))
    numbers = {"validated": validated, "loss": step.loss, "gradient norm": step.grad_norm}
    return numbers | {name: full_tensor(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def full_tensor(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def learn_all(rank: int, cases: list[tuple[str, str]], degrees: dict[str, int]) -> list[dict[str, Tensor]]:
    return [learn(rank, *case, degrees) for case in cases]


CASES = [("llama3", "document_mean"), ("llama3", "preference"), ("routed", "document_mean")]


@pytest.fixture(scope="module")
def single_process() -> list[dict[str, Tensor]]:
    return run_on_ranks(1, learn_all, CASES, {})[0]


def max_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    """Return the greatest relative difference and the name of its tensor."""
    assert actual.keys() == expected.keys()
    return max((float((actual[name] - value).norm() / value.norm()), name) for name, value in expected.items())


@pytest.mark.parametrize("axis", ["context", "tensor", "pipeline", "shard"])
def test_mesh_equals_one_process(axis: str, single_process: list[dict[str, Tensor]]) -> None:
    for case, first, second, expected in zip(
        CASES, *run_on_ranks(2, learn_all, CASES, {axis: 2}), single_process, strict=True
    ):
        actual = first | second  # a pipeline rank has the gradients of its own layers only
        assert max_difference(actual, expected) < (1e-5, ""), f"{case} on {axis} 2"


def test_preference_loss_equals_full_logits(single_process: list[dict[str, Tensor]]) -> None:
    torch.manual_seed(0)
    model, batch = build_parallel(MODELS["llama3"], TrainingConfig(), Mesh(ParallelConfig(), CPU)).full_model, rows()
    masks = model.get_attention_masks(batch)
    logits = model(batch.tokens, attention_masks=masks, positions=batch.positions)
    log_probs = -F.cross_entropy(logits.mT, batch.labels, ignore_index=-100, reduction="none")
    loss = torch.zeros(())
    for row, ids in enumerate(batch.document_ids):
        scores = [log_probs[row, ids == number].sum() for number in range(2 * PAIRS)]
        loss = loss - sum(F.logsigmoid(BETA * (scores[i] - scores[i + 1])) for i in range(0, 2 * PAIRS, 2))
    loss = loss / (len(batch.tokens) * PAIRS)
    loss.backward()
    expected = {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}
    actual = {
        name: value for name, value in single_process[CASES.index(("llama3", "preference"))].items() if name in expected
    }
    assert max_difference(actual, expected) < (1e-5, "")
