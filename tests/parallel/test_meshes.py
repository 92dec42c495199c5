"""Whole runs on many processes against the same run on one."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sightline.config import Checkpoint, Data, Logging, Optimizer, Parallel, Run, Training, Validation
from sightline.models import config_of
from sightline.training import train
from sightline.training.metrics import read_metrics
from sightline.training.terminal import Terminal
from tests.parallel.processes import on_processes
from tests.training.small_runs import write_corpus

STEPS = 10
COMPARED = ("loss", "grad_norm", "visible_pairs", "tokens", "packing_fill")


def small_run(directory: Path, source: Path, family: str, parallel: Parallel, **training: Any) -> Run:
    """Ten steps of 4 rows; no two rows of a batch are alike."""
    options = {"global_batch_size": 4, "micro_batch_size": 1, **training}
    return Run(
        model=dataclasses.replace(
            config_of(f"{family}-debug"), **({"tied_embeddings": False} if family == "qwen3" else {})
        ),
        output_dir=directory,
        data=Data(source=str(source), validation_share=0.1),
        training=Training(steps=STEPS, sequence_length=64, device="cpu", **options),
        parallel=parallel,
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=2),
        validation=Validation(every=5, rows=3),
        checkpoint=Checkpoint(every=0),
        logging=Logging(tensorboard=False, sample_tokens=3),
    )


def train_on(rank: int, run: Run) -> str:
    said = io.StringIO()
    train(run, Terminal(Console(file=said, width=200)))
    return said.getvalue()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """The rows of a family's run on one process, made when they are first asked for."""
    made: dict[str, list[dict[str, Any]]] = {}

    def rows(family: str, **training: Any) -> list[dict[str, Any]]:
        key = json.dumps([family, training])
        if key not in made:
            directory = tmp_path_factory.mktemp(family) / "run"
            on_processes(1, train_on, small_run(directory, source, family, Parallel(), **training))
            made[key] = read_metrics(directory / "metrics.jsonl")
        return made[key]

    return rows


def check(family: str, degrees: dict[str, Any], source: Path, tmp_path: Path, alone: Any, **training: Any) -> None:
    world = 1
    for axis in ("replicate", "shard", "context", "tensor", "pipeline"):
        world *= degrees.get(axis, 1)
    run = small_run(tmp_path / "run", source, family, Parallel(**degrees), **training)
    said = on_processes(world, train_on, run, join=False)
    assert "a sample" in said[0] and not any(said[1:]), "rank 0 alone speaks"
    rows, expected = read_metrics(run.output_dir / "metrics.jsonl"), alone(family, **training)
    assert len(rows) == len(expected) == STEPS
    for row, truth in zip(rows, expected, strict=True):
        assert row.keys() == truth.keys()
        for name in COMPARED:
            assert row[name] == pytest.approx(truth[name], rel=1e-5), (row["step"], name)
        if "validation_loss" in truth:
            assert row["validation_loss"] == pytest.approx(truth["validation_loss"], rel=1e-5)


FAST = [
    ("llama3", {"shard": 2}),
    ("llama3", {"replicate": 2, "shard": 2}),
    ("llama3", {"pipeline": 2}),
    ("llama4", {"context": 2}),
    ("deepseek_v3", {"shard": 2, "expert": 2}),
]
SLOW: list[tuple[str, dict[str, Any]]] = [
    ("llama3", {"shard": 4}),
    ("llama3", {"replicate": 2}),
    *((family, {"shard": 2}) for family in ("llama4", "qwen3", "deepseek_v3", "gpt_oss", "qwen3_next")),
]


@pytest.mark.parametrize(("family", "degrees"), FAST, ids=str)
def test_a_mesh_trains_as_one_process(family, degrees, source, tmp_path, alone) -> None:
    check(family, degrees, source, tmp_path, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "degrees"), SLOW, ids=str)
def test_every_mesh_trains_as_one_process(family, degrees, source, tmp_path, alone) -> None:
    check(family, degrees, source, tmp_path, alone)
