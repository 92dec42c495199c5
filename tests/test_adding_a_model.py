"""The code of docs/adding_a_model.md is examples/ministral.py, which is a complete model."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MinistralConfig as TheirConfig
from transformers import MinistralForCausalLM

from examples.ministral import MINISTRAL, Ministral, MinistralConfig, config_to_hf
from sightline import Batch
from sightline.cli.main import run as command
from sightline.config import ParallelConfig, Run
from sightline.models import build_model, load_pretrained
from sightline.training.metrics import read_metrics
from tests.support.against_transformers import (
    assert_cached_logits,
    assert_greedy_text,
    assert_no_leakage,
    assert_round_trip,
    assert_same_model,
    random_documents,
    random_theirs,
    run,
)
from tests.support.processes import run_on_ranks
from tests.support.small_runs import small_run, train_quietly, write_corpus

ROOT = Path(__file__).parent.parent
EXAMPLE = (ROOT / "examples" / "ministral.py").read_text()
PAGE = (ROOT / "docs" / "adding_a_model.md").read_text()
V = 96


@pytest.fixture(scope="module")
def theirs() -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 96,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "max_position_embeddings": 64,
    }
    return random_theirs(MinistralForCausalLM, TheirConfig(**sizes))


def as_ours(theirs: Any, directory: Path) -> Ministral:
    """Save their model and load it as ours."""
    theirs.save_pretrained(directory)
    return load_pretrained(directory, family=MINISTRAL)


@pytest.fixture
def anchored() -> Ministral:
    """A small model with anchors: one sliding-window layer, then one full layer."""
    torch.manual_seed(0)
    return build_model(replace(MINISTRAL.presets["debug"], vocab_size=V, sliding_window=4, anchors=2))


def test_example_has_under_150_lines() -> None:
    assert EXAMPLE.count("\n") < 150


def test_code_of_the_page_equals_the_file() -> None:
    def lines(code: str) -> Iterator[str]:
        return (line for line in code.splitlines() if line.strip())

    shown = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert list(lines("\n".join(shown))) == list(lines(EXAMPLE))


def test_masks_by_hand(anchored: Ministral) -> None:
    """Documents of 7 and 3 tokens, then padding; a window of 4, 2 anchors."""
    batch = Batch.from_documents([[1] * 7, [2] * 3], length=12)
    window, full = (
        anchored.get_attention_masks(batch)[name].to_dense()[0].int().tolist() for name in ("window", "full")
    )
    assert window[6] == [1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert window[9] == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0]
    assert full[6] == [1] * 7 + [0] * 5 and full[10] == [0] * 12
    assert [sum(row) for row in window] == [1, 2, 3, 4, 5, 6, 6, 1, 2, 3, 0, 0]


@pytest.mark.parametrize(("lengths", "length"), [([40], 40), ([1, 30, 2, 7, 17, 23, 8], 40)])
def test_logits_and_gradients_equal_transformers(theirs: Any, tmp_path: Path, lengths: list[int], length: int) -> None:
    assert_same_model(as_ours(theirs, tmp_path), theirs, random_documents(lengths, V), length)


def test_transformers_loads_saved_model(theirs: Any, tmp_path: Path) -> None:
    ours = as_ours(theirs, tmp_path / "theirs")
    assert_round_trip(ours, theirs, type(theirs), torch.tensor(random_documents([40], V)), tmp_path / "back")


def test_packed_equals_separate(anchored: Ministral) -> None:
    documents = random_documents([5, 30, 1, 4], V)
    packed = run(anchored, Batch.from_documents(documents, length=48))[0]
    alone = [run(anchored, Batch.from_documents([tokens], length=max(2, len(tokens))))[0] for tokens in documents]
    expected = torch.cat([logits[: len(tokens)] for logits, tokens in zip(alone, documents, strict=True)])
    torch.testing.assert_close(packed[:40], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changed", [0, 20])
def test_no_leakage_between_documents(anchored: Ministral, changed: int) -> None:
    assert_no_leakage(anchored, Batch.from_documents(random_documents([30, 7, 3], V), length=44), 0, changed)


def test_generation_uses_the_masks(anchored: Ministral) -> None:
    tokens = random_documents([12], V)[0]
    assert_cached_logits(anchored, tokens, cuts=[3, 4, 9])
    assert_greedy_text(anchored, tokens, count=5)


@pytest.fixture(scope="module")
def user_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's directory with the example, a corpus, and a run of 30 steps that was resumed after 20."""
    home = tmp_path_factory.mktemp("home")
    (home / "mine").mkdir()
    shutil.copyfile(ROOT / "examples" / "ministral.py", home / "mine" / "ministral.py")
    write_corpus(home / "texts")
    for steps in ("20", "30"):
        output = sightline(home, "train", "mine.ministral:RUN", *OPTIONS, "--training.steps", steps)
        assert ("continued from step-20" in output) == (steps == "30"), output
    return home


OPTIONS = (
    *("--data.source", "texts", "--model.anchors", "0", "--training.sequence-length", "64", "--training.device", "cpu"),
    *("--validation.every", "0", "--logging.no-tensorboard", "--logging.sample-tokens", "3"),
)


def sightline(home: Path, *arguments: str, code: int = 0) -> str:
    """Run the command in `home` in a new process and return its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = subprocess.run(
        [sys.executable, "-m", "sightline", *arguments], cwd=home, env=environment, capture_output=True, text=True
    )
    assert process.returncode == code, process.stdout + process.stderr
    return process.stdout + process.stderr


def test_command_line_trains_resumes_and_converts(
    user_directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    losses = [row["loss"] for row in read_metrics(user_directory / "runs" / "ministral-debug" / "metrics.jsonl")]
    assert len(losses) == 30 and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert sightline(user_directory, "convert", "mine.ministral:RUN", "exported").startswith("wrote the model of runs/")
    ours = load_pretrained(user_directory / "exported", family=MINISTRAL)
    theirs = MinistralForCausalLM.from_pretrained(user_directory / "exported")
    batch = Batch.from_documents(random_documents([40], 300), length=40)
    with torch.no_grad():
        torch.testing.assert_close(run(ours, batch), theirs(input_ids=batch.tokens).logits, atol=1e-4, rtol=0)

    monkeypatch.chdir(user_directory)
    start = ("--model-from", "exported", "--output-dir", "runs/begun", *OPTIONS, "--training.steps", "1")
    assert command(["train", "examples.ministral:RUN", *start]) == 0
    assert "sightline generate runs/begun --family examples.ministral:MINISTRAL" in capsys.readouterr().out
    assert command(["generate", "exported", "--prompt", "A run", "--family", "examples.ministral:RUN"]) == 0
    assert "A run" in capsys.readouterr().out


def test_other_commands_accept_the_recipe(user_directory: Path) -> None:
    output = sightline(user_directory, "generate", "mine.ministral:RUN", "--prompt", "A run", "--max-new-tokens", "5")
    assert output.startswith("A run")
    output = sightline(user_directory, "masks", "mine.ministral:RUN", "--sequence-length", "64", "--stats")
    assert "window, row 0 of 4: S 64, K " in output and "full, row 0 of 4: S 64, K 1" in output
    output = sightline(user_directory, "plan", "mine.ministral:RUN", "--processes", "2", "--parallel.tensor", "2")
    assert output.startswith("mine.ministral:RUN, ") and "tensor 2" in output


def test_a_directory_never_causes_an_import(
    user_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A family named in config.json is not imported, even if it could be: the user must name it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "ministral.py").write_text("raise SystemExit('imported')")
    shutil.copytree(user_directory / "runs" / "ministral-debug", tmp_path / "run")
    shutil.copytree(user_directory / "texts", tmp_path / "texts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for arguments in (("generate", "run"), ("convert", "run", "out"), ("masks", "run")):
        assert command([*arguments]) == 2
        error = capsys.readouterr().err
        assert "names the model family 'mine.ministral:MINISTRAL'; it is defined outside the package" in error
        assert "--family mine.ministral:MINISTRAL" in error
        family = "examples.ministral:MINISTRAL"  # the same family, importable in this process
        assert command([*arguments, "--family", family]) == 0


def train_on(rank: int, run: Run) -> None:
    train_quietly(run)


@pytest.mark.parametrize(
    "degrees",
    [
        {"context": 2},
        pytest.param({"tensor": 2}, marks=pytest.mark.slow),
        pytest.param({"pipeline": 2}, marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_like_one(degrees: dict[str, int], tmp_path: Path) -> None:
    # With the default eps, Adam would amplify gradients that are only rounding error.
    changes = {"model": MINISTRAL.presets["debug"], "optimizer__eps": 1e-5}
    alone = small_run(tmp_path / "alone", write_corpus(tmp_path / "texts"), **changes)
    train_quietly(alone)
    run_on_ranks(
        2, train_on, replace(alone, output_dir=tmp_path / "two", parallel=ParallelConfig(**degrees)), join=False
    )
    rows, expected = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("two", "alone"))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-5)
    assert [row["visible_pairs"] for row in rows] == [row["visible_pairs"] for row in expected]


def test_anchors_cannot_be_saved_for_transformers() -> None:
    with pytest.raises(ValueError, match=r"no anchors; expected model.anchors 0, got 2"):
        config_to_hf(MINISTRAL.presets["debug"])
    with pytest.raises(ValueError, match=r"model.anchors must be at least 0, got -1"):
        MinistralConfig(anchors=-1)
