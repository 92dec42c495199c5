"""Checkpoints of 0.2.0: weights and optimizer state load, and the next step equals that of 0.2.0.

Each archive holds `step-2` of a small model and expected.json: the loss and gradient norm that 0.2.0 computed on the batch
below, and the sum of the absolute values of all weights after one more step.
"""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from sightline import Batch
from sightline.config import OptimizerConfig
from sightline.parallel.parallel_model import single_process_model
from sightline.training.checkpoint import read_tensors, tensors
from sightline.training.loading import load
from sightline.training.optimizer import build_optimizer
from sightline.training.step import train_step

FIXTURES = sorted((Path(__file__).parent.parent / "fixtures" / "checkpoints").glob("*.tar.xz"))
CPU = torch.device("cpu")


def fixed_batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    documents = [torch.randint(2, 260, (length,), generator=generator).tolist() for length in (5, 1, 30, 17, 40)]
    return Batch.from_documents(documents, length=64)


@pytest.mark.parametrize("archive", FIXTURES, ids=lambda path: path.name.split(".")[0])
def test_a_checkpoint_of_0_2_0_continues(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    directory = tmp_path / archive.name.split(".")[0]
    expected = json.loads((directory / "expected.json").read_text())
    model = load(directory / "step-2", device=CPU).model.train()
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-2))
    read_tensors(directory / "step-2", tensors(model, optimizer, CPU))
    result = train_step(
        single_process_model(model), optimizer, fixed_batch(), None, micro_batch_size=1, max_grad_norm=1.0
    )
    assert result.loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    assert result.grad_norm.item() == pytest.approx(expected["grad_norm"], rel=1e-5)
    weights = sum(p.detach().double().abs().sum().item() for p in model.parameters())
    assert weights == pytest.approx(expected["weights"], rel=1e-7)
