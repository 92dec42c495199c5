"""Ranks that differ in options, data or versions end with an error that names the rank and both values."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from sightline.attention import BACKENDS
from sightline.attention.attend import AUTO
from sightline.config import Run
from sightline.errors import AnotherRankEnded
from sightline.native import why_missing
from sightline.parallel.host import HostGroup
from sightline.training import setup, trainer
from sightline.training.same_on_all_ranks import check_same, versions
from tests.support.processes import run_on_ranks
from tests.support.small_runs import small_run, train_quietly, write_corpus


def train_on(rank: int, run: Run, changed: Run) -> str:
    """Train `changed` on rank 1 and `run` on rank 0; return the error that the rank reports."""
    with pytest.raises((ValueError, AnotherRankEnded)) as error:
        train_quietly(changed if rank == 1 else run)
    return str(error.value)


def test_other_options_are_rejected(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", write_corpus(tmp_path / "texts"))
    optimizer = dataclasses.replace(run.optimizer, learning_rate=0.5)
    changed = dataclasses.replace(run, optimizer=optimizer, seed=3)
    assert run_on_ranks(2, train_on, run, changed, join=False) == [
        "optimizer.learning_rate is 0.5 on rank 1, but 0.003 on rank 0; seed is 3 on rank 1, but 0 on rank 0; all "
        "ranks must be the same: start every rank with the same command",
        "",
    ]
    assert not (tmp_path / "run").exists(), "rejected before anything is written"


def test_other_data_are_rejected(tmp_path: Path) -> None:
    """The second machine lacks a file of a folder with the same path."""
    texts = write_corpus(tmp_path / "texts")
    run = small_run(tmp_path / "run", texts)
    error, other = run_on_ranks(2, lose_a_file, run, join=False)
    assert error.startswith("data is ") and " on rank 1, but " in error and not other
    assert "copy the same files to every machine" in error


def lose_a_file(rank: int, run: Run) -> str:
    load_documents = setup.load_documents
    if rank == 1:
        setup.load_documents = lambda data: load_documents(data).select(np.arange(19))  # type: ignore[assignment]
    return train_on(rank, run, run)


def compare_versions(rank: int) -> str:
    facts = versions() | ({"version of PyTorch": "1.0"} if rank else {})
    with pytest.raises(ValueError) as error:
        check_same(HostGroup(), facts)
    return str(error.value)


def train_with_backends(rank: int, run: Run, names: list[str]) -> str:
    """Train where `auto` finds only the backend `names[rank]` on this rank; return the error, or the kernels used."""
    AUTO["cpu"] = (names[rank],)
    for backend in BACKENDS:
        if backend.name == "native" and names[rank] == "tiled":
            type(backend).supports = lambda self, requirements: "native is not built: no compiler"  # type: ignore
    models = []
    build, trainer.build_parallel = (
        trainer.build_parallel,
        lambda *args, **options: models.append(build(*args, **options)) or models[-1],
    )
    try:
        train_quietly(run)
    except (ValueError, AnotherRankEnded) as error:
        return str(error)
    return ", ".join(sorted({kernel.split(":")[0] for kernel in models[0].attention_kernels.values()}))


def test_the_backend_of_rank_0_is_used_by_all_ranks(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", write_corpus(tmp_path / "texts"), training__steps=1)
    assert run_on_ranks(2, train_with_backends, run, ["tiled", "reference"], join=False) == ["tiled", "tiled"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["attention_kernel"] == "tiled" and config["attention"]["backend"] == "auto"


@pytest.mark.skipif(why_missing() is not None, reason=f"native is not built: {why_missing()}")
def test_a_rank_without_the_backend_of_rank_0_is_rejected(tmp_path: Path) -> None:
    run = small_run(tmp_path / "run", write_corpus(tmp_path / "texts"), training__steps=1)
    error, other = run_on_ranks(2, train_with_backends, run, ["native", "tiled"], join=False)
    assert "rank 0 uses the attention backend 'native', but rank 1 cannot" in error and not other
    assert "native is not built: no compiler; supported backends: sdpa, tiled" in error
    assert not (tmp_path / "run").exists()


def test_all_ranks_that_differ_are_counted() -> None:
    for error in run_on_ranks(3, compare_versions):
        assert error.startswith("version of PyTorch is '1.0' on rank 1, but '2.")
        assert "(also different: 1 other ranks)" in error and "install the same versions on every machine" in error


def test_equal_ranks_are_accepted() -> None:
    check_same(HostGroup(), versions())
