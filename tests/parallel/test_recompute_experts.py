"""Selective recomputation with experts, sharded over shard x expert and context x expert, against one process."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sightline import Batch
from sightline.config import ParallelConfig, TrainingConfig
from sightline.models import config_of
from sightline.parallel.apply import build_parallel
from sightline.parallel.mesh import AXES, Mesh
from sightline.training.step import prepare_batch
from tests.support.processes import run_on_ranks

FAMILIES = ("llama4-debug", "qwen3-debug-moe", "deepseek_v3-debug", "gpt_oss-debug", "qwen3_next-debug")
MESHES: list[dict[str, Any]] = [{"shard": 2, "expert": 2}, {"context": 2, "expert": 2}]
TRAINING = TrainingConfig(sequence_length=32, global_batch_size=2, micro_batch_size=1, device="cpu")


def two_rows(vocab_size: int) -> Batch:
    """Two rows of documents of several lengths."""
    lengths = (20, 12, 7, 25)
    documents = [[(31 * i + 7 * t) % (vocab_size - 8) for t in range(n)] for i, n in enumerate(lengths)]
    return Batch.from_documents(documents, length=TRAINING.sequence_length)


def learn(config: Any, degrees: dict[str, Any]) -> dict[str, Tensor]:
    """Return the loss, summed over two passes through the rows, and all gradients. Each forward takes one row."""
    torch.manual_seed(0)  # of the initial weights
    mesh = Mesh(ParallelConfig(**degrees), torch.device("cpu"))
    model = build_parallel(config, replace(TRAINING, recompute="selective" if degrees else "none"), mesh)
    batch = two_rows(config.vocab_size)
    local = 2 // mesh.size("data")
    batch = batch[mesh.index("data") * local : (mesh.index("data") + 1) * local]
    found = {"loss": torch.zeros(())}
    for number in [*range(local)] * 2:
        row = prepare_batch(model, batch[number : number + 1], None, torch.device("cpu"))
        found["loss"] += model.forward_backward(model.local_inputs(row), 1.0)
    mesh.all_reduce(found["loss"], "loss")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
    return found


def learn_all(rank: int, degrees: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    return {name: learn(config_of(name), degrees) for name in FAMILIES}


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, Tensor]]:
    """Losses and gradients of every family on one process, which saves all activations."""
    return learn_all(0, {})


@pytest.mark.parametrize("degrees", MESHES, ids=str)
def test_selective_recompute_of_experts_equals_one_process(degrees, one_process) -> None:
    world = math.prod(degrees.get(axis, 1) for axis in AXES)
    for found in run_on_ranks(world, learn_all, degrees):
        for family, expected in one_process.items():
            assert found[family].keys() == expected.keys()
            for name, value in expected.items():
                difference = (found[family][name] - value).abs().max() / value.abs().max()
                assert difference < 1e-4, (family, name, float(difference))
