"""Sightline as a library: `sightline.train`, `sightline.load`, and what `import sightline` imports."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sightline
from sightline.config import OptimizerConfig, ParallelConfig, Run
from sightline.data import Loader, load_documents, load_tokenizer, split_documents
from sightline.errors import Stopped
from sightline.models import save_pretrained
from sightline.training import trainer
from tests.support.processes import run_on_ranks
from tests.support.small_runs import rows_of, small_run, train_quietly, write_corpus

SLOW_TO_IMPORT = (
    "matplotlib", "tensorboard", "transformers", "sympy", "torch._dynamo", "torch.distributed.tensor",
    "torch.distributed.pipelining", "torch.distributed.checkpoint", "sightline.training.trainer",
)  # fmt: skip

NO_DECAY = OptimizerConfig(learning_rate=3e-3, warmup_steps=2, schedule="wsd", decay_ratio=0.0)
"""A learning rate that does not depend on the number of steps."""


def imported(code: str, *names: str) -> list[str]:
    """Run `code` in a subprocess; return which of the modules `names` it imported."""
    script = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(*(n for n in {names} if n in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200, check=True)
    return result.stdout.splitlines()[-1].split()


def test_importing_sightline_imports_nothing_slow() -> None:
    assert imported("import sightline", *SLOW_TO_IMPORT, "torch", "tyro", "rich", "safetensors") == []
    assert imported("from sightline import Batch", *SLOW_TO_IMPORT, "tyro", "rich", "safetensors", "torch") == ["torch"]


@pytest.mark.parametrize(
    ("arguments", "also"),
    [
        (["--help"], ["torch"]),
        (["nonsense"], ["torch"]),
        (["train", "--help"], []),
        (["train", "llama3-tiny", "--help"], []),
        (["train", "llama3-tiny", "--wrong", "1"], []),
        *(([command, "--help"], ["sightline.data.loader"]) for command in ("convert", "masks", "plan")),
        *(([command, "x", "--wrong", "1"], []) for command in ("convert", "generate", "masks")),
        (["generate", "--help"], []),
        (["plan", "llama3-tiny", "--wrong", "1"], []),
        (["plan", "llama3-tiny", "--gpu", "wrong"], []),
    ],
)
def test_help_and_wrong_options_import_nothing_slow(arguments: list[str], also: list[str]) -> None:
    assert imported(f"from sightline.cli.main import main; main({arguments})", *SLOW_TO_IMPORT, *also) == []


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="module 'sightline' has no attribute 'nonsense'; it has Batch"):
        _ = sightline.nonsense


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of six steps on text."""
    directory = tmp_path_factory.mktemp("library")
    run = small_run(directory / "run", write_corpus(directory / "texts"), training__steps=6, validation__every=0)
    assert sightline.train(run, trainer.Terminal(trainer.Console(quiet=True))) == directory / "run"
    return run


def test_run_checkpoint_and_hugging_face_directory_load_the_same_model(run: Run, tmp_path: Path) -> None:
    loaded = sightline.load(str(run.output_dir))
    model, tokenizer = loaded
    assert loaded.model is model and not model.training
    assert tokenizer.decode(tokenizer.encode("def f")) == "def f"
    save_pretrained(model, tmp_path / "hf", source=run.output_dir)
    for directory in (run.output_dir / "checkpoints" / "step-6", tmp_path / "hf"):
        other = sightline.load(directory, device="cpu")
        assert all(torch.equal(value, other.model.state_dict()[name]) for name, value in model.state_dict().items())
        assert other.tokenizer.fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match="nowhere does not exist; expected the directory of a run"):
        sightline.load("nowhere")


class Batches:
    """User batches that equal those of the run's loader."""

    def __init__(self, run: Run, rank: int = 0, world: int = 1) -> None:
        tokenizer = load_tokenizer(run.data.tokenizer or run.output_dir)
        documents, _ = split_documents(load_documents(run.data), run.data.validation_fraction)
        self.loader = Loader(documents, tokenizer, rows=2, sequence_length=48, seed=run.seed, rank=rank, world=world)
        self.state_dict, self.load_state_dict = self.loader.state_dict, self.loader.load_state_dict

    def __iter__(self):
        return self.loader


def without(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {other: value for other, value in row.items() if other != name}


def with_user_batches(run: Run, directory: Path, **changes: Any) -> Run:
    data = dataclasses.replace(run.data, tokenizer=run.output_dir / "tokenizer.json")
    return dataclasses.replace(run, output_dir=directory, data=data, **changes)


def test_user_batches_resume_exactly(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_quietly(with_user_batches(run, tmp_path / "whole"), batches=Batches(run))
    expected = [without(row, "epoch") for row in rows_of(run.output_dir)]
    assert rows_of(tmp_path / "whole") == expected

    original, calls = trainer.train_step, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), 15)
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    with pytest.raises(Stopped):
        train_quietly(with_user_batches(run, tmp_path / "stopped"), batches=lambda rank, world: Batches(run))
    assert len(rows_of(tmp_path / "stopped")) == 2
    output = train_quietly(with_user_batches(run, tmp_path / "stopped"), batches=lambda rank, world: Batches(run))
    assert "your batches" in output and "continued from step-2" in output
    assert rows_of(tmp_path / "stopped") == expected


def train_on_user_batches(rank: int, run: Run) -> None:
    train_quietly(run, batches=lambda rank, world: Batches(run, rank, world))


def test_user_batches_on_two_ranks_equal_one(run: Run, tmp_path: Path) -> None:
    for steps in (2, 6):
        training = dataclasses.replace(run.training, steps=steps)
        options = {"training": training, "parallel": ParallelConfig(shard=2), "optimizer": NO_DECAY}
        run_on_ranks(2, train_on_user_batches, with_user_batches(run, tmp_path / "two", **options), join=False)
    train_quietly(with_user_batches(run, tmp_path / "one", optimizer=NO_DECAY), batches=Batches(run))
    rows, expected = rows_of(tmp_path / "two"), rows_of(tmp_path / "one")
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-6)
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in expected]


def test_user_batches_without_a_state_do_not_resume(run: Run, tmp_path: Path) -> None:
    shorter = dataclasses.replace(run.training, steps=2)
    train_quietly(with_user_batches(run, tmp_path / "run", training=shorter), batches=iter(Batches(run).loader))
    with pytest.raises(ValueError, match="stopped after step 2, and a generator cannot resume there"):
        train_quietly(with_user_batches(run, tmp_path / "run"), batches=(batch for batch in Batches(run)))


def test_user_batches_need_a_tokenizer(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"your batches have no text to train a tokenizer on; set .*data\.tokenizer"):
        train_quietly(dataclasses.replace(run, output_dir=tmp_path / "run"), batches=Batches(run))
