"""Runs of a number of epochs: their steps, their tokens, padding in the last step, and what a resume may change."""

import dataclasses
import re
from pathlib import Path

import pytest

from sightline.batch import Batch
from sightline.config import DataConfig, ParallelConfig, Run
from sightline.data import Tokenizer
from sightline.models import config_of
from sightline.training.checkpoint_directory import find_latest
from sightline.training.resume import check_continues
from sightline.training.run_directory import settings
from sightline.training.schedule import learning_rate
from tests.support.processes import run_on_ranks
from tests.support.small_runs import rows_of, small_run, train_quietly, write_corpus


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("source") / "texts")


def epochs_of(directory: Path, source: Path, epochs: int | None, **changes) -> Run:
    return small_run(directory, source, data__epochs=epochs, validation__every=2, **changes)


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_a_run_has_each_token_once_per_epoch(packing: str, source: Path, tmp_path: Path) -> None:
    run = epochs_of(tmp_path / "run", source, 2, training__global_batch_size=8, data__packing=packing)
    output = train_quietly(run)
    described = re.search(
        r"18 documents, ([\d,]+) tokens, (\d+) rows of 48, \d+\.\d% full; 2 epochs of (\d+) rows = (\d+) steps", output
    )
    assert described, output
    tokens, per_epoch, again, steps = (int(number.replace(",", "")) for number in described.groups())
    assert per_epoch == again and steps == -(-2 * per_epoch // 8) and 2 * per_epoch % 8 != 0
    rows = rows_of(run.output_dir)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert sum(row["tokens"] for row in rows) == 2 * tokens
    assert [row["epoch"] for row in rows] == [min(8 * step / per_epoch, 2.0) for step in range(1, steps + 1)]
    assert rows[-1]["packing_fill"] <= 2 * per_epoch % 8 / 8, "the last step is padded"
    assert [row["learning_rate"] for row in rows] == [
        learning_rate(step, run.optimizer, steps) for step in range(1, steps + 1)
    ]
    assert "validation_loss" in rows[-1]
    assert "nothing left to train" in train_quietly(run)


def train_on(rank: int, run: Run) -> None:
    """Train on a rank; only the first rank of the machine may tokenize the documents."""
    if rank > 0 and run.data.source != "synthetic-images":
        Tokenizer.encode_all = None  # type: ignore[method-assign, assignment]
    train_quietly(run)


MESHES = [
    ("llama3", {"replicate": 2}),
    ("qwen3-debug-moe", {"shard": 2, "expert": 2}),
    *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in [
        ("llama3", {"shard": 2}), ("llama3", {"pipeline": 2}), ("llama3", {"tensor": 2}), ("llama3", {"context": 2}),
        ("qwen3_next-debug", {"shard": 2}), ("deepseek_v3-debug", {"pipeline": 2}), ("gpt_oss-debug", {"context": 2}),
        ("vlm-debug", {"shard": 2}), ("vlm-debug", {"pipeline": 2}),
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("model", "degrees"), MESHES, ids=str)
def test_ranks_whose_rows_are_padding_equal_one_process(model: str, degrees: dict[str, int], tmp_path: Path) -> None:
    """The last step has one or two rows of data and as many or more of padding, which the second data rank has."""
    source = write_corpus(tmp_path / "texts")
    changes = {"training__global_batch_size": 4, "training__sequence_length": 64}
    if model == "vlm-debug":
        changes |= {"data__source": "synthetic-images", "training__sequence_length": 96}
    if model != "llama3":
        changes["model"] = config_of(model)
    one = epochs_of(tmp_path / "one", source, 1, **changes)
    train_quietly(one)
    expected = rows_of(one.output_dir)
    assert expected[-1]["packing_fill"] <= 0.5 and expected[-1]["epoch"] == 1.0
    data = dataclasses.replace(one.data, cache_dir=tmp_path / "new cache")
    two = dataclasses.replace(one, output_dir=tmp_path / "two", parallel=ParallelConfig(**degrees), data=data)
    run_on_ranks(2, train_on, two, join=False)
    actual = rows_of(two.output_dir)
    assert [row["tokens"] for row in actual] == [row["tokens"] for row in expected]
    for row, other in zip(actual, expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-4)


def test_the_number_of_epochs_may_change_on_resume(source: Path, tmp_path: Path) -> None:
    """Each epoch is complete: the padding of the last step does not take rows from the next epoch."""
    first = epochs_of(tmp_path / "run", source, 1, training__global_batch_size=4)
    train_quietly(first)
    tokens = sum(row["tokens"] for row in rows_of(first.output_dir))
    longer = dataclasses.replace(first, data=DataConfig(**{**vars(first.data), "epochs": 3, "cache_dir": tmp_path}))
    latest = find_latest(tmp_path / "run" / "checkpoints")
    assert latest is not None
    assert check_continues(latest, settings(longer)) == [
        "data.epochs is now 3, was 1: the learning rate follows the schedule of the new number of steps from here on"
    ]
    train_quietly(longer)
    rows = rows_of(first.output_dir)
    assert sum(row["tokens"] for row in rows) == 3 * tokens and rows[-1]["epoch"] == 3.0
    assert rows[-1]["learning_rate"] == pytest.approx(first.optimizer.learning_rate * first.optimizer.min_lr_ratio)


def test_epochs_of_user_batches_are_refused(source: Path, tmp_path: Path) -> None:
    batches = [Batch.from_documents([[1] * 48] * 2, 48)]
    train_quietly(small_run(tmp_path / "first", source, training__steps=1))
    run = epochs_of(tmp_path / "run", source, 1, data__tokenizer=tmp_path / "first" / "tokenizer.json")
    with pytest.raises(ValueError, match=r"data\.epochs is 1, but .* your own batches is unknown; set training\.steps"):
        train_quietly(run, batches=batches)


def test_epochs_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"data\.epochs must be greater than 0, got 0"):
        DataConfig(epochs=0)
