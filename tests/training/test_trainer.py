"""A training run from its config to the final summary."""

import dataclasses
import json
import math
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from sightline.attention import native
from sightline.config import LoggingConfig
from sightline.errors import Stopped
from sightline.native import why_missing
from sightline.training import step, trainer
from sightline.training.checkpoint_directory import list_checkpoints
from sightline.training.loading import load
from sightline.training.metrics import read_metrics
from sightline.training.run_directory import load_config
from sightline.training.schedule import learning_rate
from tests.support.small_runs import STEPS, open_trainer, rows_of, small_run, train_quietly, write_corpus


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("source") / "texts")


@pytest.fixture(scope="module")
def run(source, tmp_path_factory):
    """A finished run with all files that a run writes."""
    run = small_run(tmp_path_factory.mktemp("run") / "run", source, validation__every=3)
    return dataclasses.replace(run, logging=LoggingConfig(tensorboard=True, sample_tokens=8, sample_prompt="def "))


@pytest.fixture(scope="module")
def output(run) -> str:
    return train_quietly(run)


def test_the_run_directory_has_all_files(run, output) -> None:
    names = {path.name for path in run.output_dir.iterdir() if not path.name.startswith(".")}
    assert names == {
        "config.json", "tokenizer.json", "tokenizer_config.json", "metrics.jsonl", "checkpoints", "tensorboard",
        "loss.png", "masks.png",
    }  # fmt: skip
    assert load_config(run.output_dir / "config.json") == run
    assert [path.name for path in list_checkpoints(run.output_dir / "checkpoints")] == ["step-6", "step-8"]


def test_each_step_has_its_row(run, output) -> None:
    rows = read_metrics(run.output_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "validation_loss" in row] == [3, 6, 8]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        assert row["learning_rate"] == learning_rate(row["step"], run.optimizer, STEPS)
        assert row["tokens"] <= 2 * 48 and row["packing_fill"] == row["tokens"] / (2 * 48)
        assert row["epoch"] == pytest.approx(row["step"] * rows[0]["epoch"])
        assert row["tokens"] <= row["visible_pairs"] <= 2 * 48 * 49 // 2
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert 0 < row["mfu"] < 1
    assert rows[-1]["loss"] < rows[0]["loss"]
    text = (run.output_dir / "metrics.jsonl").read_text()
    assert all(set(json.loads(line)) >= {"loss", "grad_norm", "mfu"} for line in text.splitlines())


def test_the_log_shows_the_model_and_the_output_files(run, output) -> None:
    for words in (
        "Llama3, 39.1 K parameters",
        "20 documents",
        "2 held out",
        "2 rows of 48 tokens in 2 forwards",
        "attention    native: it is the fastest backend that trains on a CPU"
        if why_missing() is None
        else "it trains on a CPU with PyTorch's fused kernels",
        "MFU",
        "a sample:\ndef ",
        "step 8 reached, loss",
        str(run.output_dir / "checkpoints" / "step-8"),
        str(run.output_dir / "loss.png"),
        f"sightline generate {run.output_dir} --prompt 'def '",
    ):
        assert words in output, words
    assert "warning" not in output


def test_the_log_says_once_why_the_native_kernel_is_not_used(source, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(native, "why_missing", lambda: "no C++ compiler was found; install g++")
    output = train_quietly(small_run(tmp_path / "run", source, training__steps=3))
    assert output.count("native is not built: no C++ compiler was found; install g++; it trains on a CPU with") == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["attention_kernel"] == "tiled"


def test_equal_seeds_give_equal_runs_and_others_do_not(run, output, source, tmp_path) -> None:
    again = dataclasses.replace(run, output_dir=tmp_path / "again")
    other = dataclasses.replace(run, output_dir=tmp_path / "other", seed=1)
    for one in (again, other):
        train_quietly(one)
    assert rows_of(again.output_dir) == rows_of(run.output_dir)
    assert rows_of(other.output_dir)[0]["loss"] != rows_of(run.output_dir)[0]["loss"]


def test_micro_batches_do_not_change_the_run(run, output, tmp_path) -> None:
    training = dataclasses.replace(run.training, micro_batch_size=2)
    whole = dataclasses.replace(run, output_dir=tmp_path / "whole", training=training)
    train_quietly(whole)
    expected = [row["loss"] for row in rows_of(run.output_dir)]
    assert [row["loss"] for row in rows_of(whole.output_dir)] == pytest.approx(expected, rel=1e-4)


def test_training_and_validation_prepare_their_batches_alike(run, source, tmp_path, monkeypatch) -> None:
    seen: list[bool] = []
    original = step.prepare_batch

    def watched(model, batch, tokenizer, device):
        seen.append(torch.is_grad_enabled())
        assert tokenizer is not None
        return original(model, batch, tokenizer, device)

    monkeypatch.setattr("sightline.training.step.prepare_batch", watched)
    train_quietly(small_run(tmp_path / "run", source, training__steps=2, validation__every=2))
    assert seen == [True, True, True, True, False, False], "2 steps of 2 forwards, 2 validation rows without gradients"


def test_metrics_that_are_read_late_are_equal(source, tmp_path) -> None:
    """The metrics of a step are written while the device computes the next step, as on a GPU."""
    now, late = (small_run(tmp_path / name, source) for name in ("now", "late"))
    train_quietly(now)
    seen: list[int] = []
    with ExitStack() as opened:
        one = open_trainer(late, opened)
        one.reads_immediately = False
        one.launch_step, launch_step = (
            lambda stop: (seen.append(len(rows_of(tmp_path / "late"))), launch_step(stop))[1],
            one.launch_step,
        )
        one.train()
    assert rows_of(tmp_path / "late") == rows_of(tmp_path / "now")
    # Rows in the file when steps 1 to 8 start: one step late, except after steps 3, 4 and 6, which save or validate.
    assert seen == [0, 0, 1, 3, 4, 4, 6, 6]
    assert all(row["seconds"] > 0 for row in read_metrics(tmp_path / "late" / "metrics.jsonl"))


@pytest.mark.parametrize(("reads_immediately", "last"), [(True, 3), (False, 4)])
def test_a_signal_stops_after_the_step_that_is_launched(reads_immediately, last, source, tmp_path, monkeypatch) -> None:
    """A device that computes while the host goes on has the next step when the signal of a step is read."""
    original, calls = trainer.train_step, []

    def step(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", step)
    with ExitStack() as opened:
        one = open_trainer(small_run(tmp_path / "run", source, checkpoint__every=0, validation__every=0), opened)
        one.reads_immediately = reads_immediately
        with pytest.raises(Stopped, match=f"stopped by SIGINT after step {last};"):
            one.train()
    assert len(calls) == len(rows_of(tmp_path / "run")) == last


def test_deterministic_algorithms_are_enabled_on_request(source, tmp_path, monkeypatch) -> None:
    asked: list[bool] = []
    original = trainer.train_step

    def watched(*args, **kwargs):
        asked.append(torch.are_deterministic_algorithms_enabled())
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", watched)
    for name in ("one", "two"):
        train_quietly(small_run(tmp_path / name, source, training__steps=3, training__deterministic=True))
    train_quietly(small_run(tmp_path / "three", source, training__steps=1))
    assert asked == [True] * 6 + [False]
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")


def test_bfloat16_on_a_cpu_logs_a_warning(source, tmp_path) -> None:
    output = train_quietly(small_run(tmp_path / "run", source, training__steps=1, training__dtype="bfloat16"))
    assert "warning: bfloat16 on a CPU" in output and "--training.dtype float32" in output


def test_without_held_out_documents_nothing_is_validated(source, tmp_path) -> None:
    train_quietly(small_run(tmp_path / "run", source, training__steps=4, data__validation_fraction=0.0))
    assert not any("validation_loss" in row for row in rows_of(tmp_path / "run"))


def test_best_fit_pads_and_counts_only_tokens(tmp_path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(32):  # equal documents of three tokens: begin, the word, end
        (tmp_path / "texts" / f"{number}.txt").write_text("abcdefghijklmnopqrs")
    run = small_run(
        tmp_path / "run",
        tmp_path / "texts",
        training__steps=2,
        training__sequence_length=50,
        data__packing="best_fit",
        data__validation_fraction=0.0,
    )
    train_quietly(run)
    for row in rows_of(run.output_dir):
        assert row["packing_fill"] == pytest.approx(0.96)
        assert row["tokens"] == 2 * 48
        assert row["visible_pairs"] == 2 * 16 * (1 + 2 + 3)


def test_a_trained_model_loads_with_its_tokenizer(run, output) -> None:
    for path in (run.output_dir, run.output_dir / "checkpoints" / "step-6"):
        trained = load(path, device="cpu")
        assert load_config(path / "config.json") == run
        assert not trained.model.training
        assert trained.tokenizer.decode(trained.tokenizer.encode("def f")) == "def f"


def test_a_plot_that_cannot_be_written_does_not_end_the_run(source, tmp_path, monkeypatch) -> None:
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sightline.training.report.plot_masks", full)
    monkeypatch.setattr("sightline.training.report.plot_loss", full)
    output = train_quietly(small_run(tmp_path / "run", source, training__steps=1))
    assert output.count("could not be written: [Errno 28] No space left on device") == 2
    assert len(rows_of(tmp_path / "run")) == 1


def test_the_picture_of_masks_has_a_row_with_several_documents(tmp_path, monkeypatch) -> None:
    source = tmp_path / "texts"
    source.mkdir()
    (source / "long.txt").write_text("one long document " * 400)
    for number in range(12):
        (source / f"{number}.txt").write_text(f"short {number}")
    documents: list[int] = []

    def plot(terminal, directory, masks, row) -> None:
        documents.append(len(masks["attention"].start[row].unique()))

    monkeypatch.setattr(trainer, "plot_batch_masks", plot)
    options = {"data__validation_fraction": 0, "validation__every": 0, "training__steps": 60}
    train_quietly(small_run(tmp_path / "run", source, seed=1, **options))
    assert documents[0] == 1 and documents[1] > 1 and len(documents) == 2, "the first batch has only long rows"
