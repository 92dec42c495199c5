"""A run that is killed at any moment and resumed is bitwise identical to one that was not killed."""

import multiprocessing
import os
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from sightline.errors import Stopped
from sightline.training import trainer
from sightline.training.checkpoint_directory import find_latest, list_checkpoints
from tests.support.small_runs import (
    STEPS,
    open_trainer,
    rows_of,
    small_run,
    train_and_kill,
    train_quietly,
    weights_of,
    write_corpus,
)

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["sightline.training.trainer"])  # imports are done once


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("source") / "texts")


@pytest.fixture(scope="module")
def undisturbed(source, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    train_quietly(small_run(directory, source))
    return directory


def kill(run, name: str, call: int, halfway: bool = False) -> None:
    process = FORKSERVER.Process(target=train_and_kill, args=(run, name, call, halfway))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, f"{name} was not called {call} times: exit code {process.exitcode}"


def assert_same_run(directory: Path, undisturbed: Path) -> None:
    rows = rows_of(directory)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert rows == rows_of(undisturbed)
    expected = weights_of(undisturbed)
    for name, weight in weights_of(directory).items():
        assert torch.equal(weight, expected[name]), name
    assert not list((directory / "checkpoints").glob(".*"))


MOMENTS = {
    "before the first step": ("sightline.training.trainer:train_step", 1),
    "before the first checkpoint": ("sightline.training.trainer:train_step", 3),
    "in the backward pass": ("sightline.training.step:clip_gradients", 5),
    "a step taken but not noted": ("sightline.training.metrics:MetricsFile.append", 5),
    "steps noted but not saved": ("sightline.training.saver:save_checkpoint", 2),
    "before the tensors are written": ("sightline.training.checkpoint:write_shards", 2),
    "while a checkpoint is copied together": ("sightline.training.checkpoint:write_file", 5),
    "while the first checkpoint is brought to the disk": ("sightline.training.checkpoint:sync", 1),
    "after a checkpoint was renamed": ("sightline.training.checkpoint:list_checkpoints", 2),
    "while an old checkpoint is removed": ("sightline.training.checkpoint:remove_checkpoint", 1),
    "after the last checkpoint": ("sightline.training.trainer:plot_losses", 1),
}


@pytest.mark.parametrize(("name", "call"), MOMENTS.values(), ids=MOMENTS)
def test_killed_and_resumed_run_equals_uninterrupted_run(name, call, source, undisturbed, tmp_path) -> None:
    run = small_run(tmp_path / "run", source)
    kill(run, name, call)
    train_quietly(run)
    assert_same_run(tmp_path / "run", undisturbed)


def test_killed_while_a_checkpoint_is_written_asynchronously(source, undisturbed, tmp_path) -> None:
    run = small_run(tmp_path / "run", source, checkpoint__asynchronous=True)
    kill(run, "sightline.training.checkpoint:write_file", 5)
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-3"]
    train_quietly(run)
    assert_same_run(tmp_path / "run", undisturbed)


def test_incomplete_line_is_dropped_on_resume(source, undisturbed, tmp_path) -> None:
    run = small_run(tmp_path / "run", source)
    kill(run, "sightline.training.metrics:MetricsFile.append", 5, halfway=True)
    assert not (tmp_path / "run" / "metrics.jsonl").read_bytes().endswith(b"\n")
    train_quietly(run)
    assert_same_run(tmp_path / "run", undisturbed)


def test_killed_again_and_again(source, undisturbed, tmp_path) -> None:
    run = small_run(tmp_path / "run", source)
    for call, newest in ((5, "step-3"), (2, "step-3"), (4, "step-6")):  # in steps 5, 5 and 7
        kill(run, "sightline.training.trainer:train_step", call)
        assert find_latest(tmp_path / "run" / "checkpoints").name == newest
    train_quietly(run)
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_exits(signum, source, undisturbed, tmp_path, monkeypatch) -> None:
    run = small_run(tmp_path / "run", source)
    original, calls = trainer.train_step, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    before = signal.getsignal(signum)
    with pytest.raises(
        Stopped, match=rf"stopped by {signal.Signals(signum).name} after step 5; saved in .*step-5\."
    ) as stop:
        train_quietly(run)
    assert stop.value.exit_code == 128 + signum
    assert signal.getsignal(signum) is before
    assert len(rows_of(tmp_path / "run")) == 5
    train_quietly(run)
    assert_same_run(tmp_path / "run", undisturbed)


def test_a_second_interrupt_exits_immediately(source, tmp_path, monkeypatch) -> None:
    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one was ignored")

    monkeypatch.setattr(trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_quietly(small_run(tmp_path / "run", source))
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


def test_a_finished_run_is_logged_and_unchanged(source, tmp_path) -> None:
    run = small_run(tmp_path / "run", source, training__steps=3)
    train_quietly(run)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    output = train_quietly(run)
    assert "all 3 steps are done" in output
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_more_steps_continue_and_warn(source, tmp_path) -> None:
    train_quietly(small_run(tmp_path / "run", source, training__steps=3))
    output = train_quietly(small_run(tmp_path / "run", source, training__steps=5))
    assert "training.steps is now 5, was 3: the learning rate" in output
    assert [row["step"] for row in rows_of(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_path_continues_in_another_directory(source, undisturbed, tmp_path) -> None:
    train_quietly(
        small_run(tmp_path / "first", source, training__steps=6, optimizer__schedule="wsd", optimizer__decay_ratio=0.0)
    )
    checkpoint = tmp_path / "first" / "checkpoints" / "step-3"
    run = small_run(
        tmp_path / "second", source, checkpoint__resume=str(checkpoint), training__steps=6,
        optimizer__schedule="wsd", optimizer__decay_ratio=0.0,
    )  # fmt: skip
    train_quietly(run)
    assert rows_of(tmp_path / "second") == rows_of(tmp_path / "first")[3:]


def test_random_number_state_is_restored(source, tmp_path) -> None:
    train_quietly(small_run(tmp_path / "run", source, training__steps=3))
    expected = torch.rand(4)
    torch.manual_seed(99)
    with ExitStack() as opened:
        open_trainer(small_run(tmp_path / "run", source, training__steps=4), opened)
        assert torch.equal(torch.rand(4), expected)
