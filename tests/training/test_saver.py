"""Asynchronous checkpoints: they hold the state at the start of the save; failures are reported later."""

import threading

import pytest
import torch

from sightline.config import CheckpointConfig
from sightline.errors import SaveFailed
from sightline.training import saver as savers
from sightline.training.checkpoint import CannotSave, Progress, load_checkpoint, tensors
from sightline.training.checkpoint_directory import find_latest
from sightline.training.saver import Saver
from tests.training.test_checkpoint import CPU, LOADER, build, trained

BOTH = pytest.mark.parametrize("asynchronous", [False, True])


@pytest.fixture
def model_and_optimizer():
    return trained()


@pytest.fixture
def warned() -> list[str]:
    return []


@pytest.fixture
def opened(tmp_path, warned):
    """Creates savers and closes them after the test."""
    savers_opened = []

    def open_saver(asynchronous: bool) -> Saver:
        run_file = tmp_path / "config.json"
        run_file.write_text("{}")
        options = CheckpointConfig(every=2, keep=2, asynchronous=asynchronous)
        savers_opened.append(Saver(tmp_path / "checkpoints", [run_file], options, warned.append))
        return savers_opened[-1]

    yield open_saver
    for one in savers_opened:
        one.close()


@pytest.fixture
def unblock(monkeypatch):
    """Writing blocks until this event is set."""
    go_on, write = threading.Event(), savers.save_checkpoint

    def waiting(*args, **kwargs):
        assert go_on.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(savers, "save_checkpoint", waiting)
    yield go_on
    go_on.set()


def test_a_checkpoint_holds_the_state_at_the_start_of_the_save(opened, unblock, model_and_optimizer, tmp_path) -> None:
    model, optimizer = model_and_optimizer
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    states = {name: state["exp_avg"].clone() for name, state in tensors(model, optimizer, CPU)["optimizer"].items()}
    saver = opened(asynchronous=True)
    saver.save(tensors(model, optimizer, CPU), Progress(2, LOADER))
    with torch.no_grad():  # the next step
        for parameter in model.parameters():
            parameter.zero_()
            optimizer.state[parameter]["exp_avg"].zero_()
    assert find_latest(tmp_path / "checkpoints") is None and saver.newest_step == 0
    unblock.set()
    saver.wait()
    assert saver.newest_step == 2
    other, other_optimizer = build(1)
    load_checkpoint(tmp_path / "checkpoints" / "step-2", tensors(other, other_optimizer, CPU), CPU)
    assert all(torch.equal(other.state_dict()[name], weight) for name, weight in expected.items())
    loaded = tensors(other, other_optimizer, CPU)["optimizer"]
    assert all(
        torch.equal(loaded[name]["exp_avg"], state_before) and state_before.any()
        for name, state_before in states.items()
    )


def test_a_second_save_waits_for_the_first(opened, unblock, model_and_optimizer, tmp_path) -> None:
    saver, state = opened(asynchronous=True), tensors(*model_and_optimizer, CPU)
    saver.save(state, Progress(2, LOADER))
    threading.Timer(0.3, unblock.set).start()
    saver.save(state, Progress(4, LOADER))
    assert (tmp_path / "checkpoints" / "step-2").is_dir()
    saver.wait()
    assert find_latest(tmp_path / "checkpoints").name == "step-4"


def test_close_waits_for_the_checkpoint(opened, unblock, model_and_optimizer, tmp_path) -> None:
    saver = opened(asynchronous=True)
    saver.save(tensors(*model_and_optimizer, CPU), Progress(2, LOADER))
    threading.Timer(0.2, unblock.set).start()
    saver.close()
    assert find_latest(tmp_path / "checkpoints").name == "step-2"


@BOTH
def test_a_failure_is_reported_once_and_the_next_save_succeeds(
    asynchronous, opened, warned, model_and_optimizer, tmp_path, monkeypatch
) -> None:
    saver, state = opened(asynchronous), tensors(*model_and_optimizer, CPU)
    saver.save(state, Progress(2, LOADER))
    saver.wait()

    def full(*_, **__):
        raise CannotSave(28, "no room")

    monkeypatch.setattr(savers, "save_checkpoint", full)
    with pytest.raises(CannotSave, match="no room"):
        saver.start(state, Progress(4, LOADER))
        saver.wait()
    saver.wait()
    saver.save(state, Progress(4, LOADER))
    while not warned:
        saver.check()
    saver.check(), saver.wait()
    assert len(warned) == 1 and "the checkpoint of step 4 could not be written" in warned[0]
    assert "no room. The run continues" in warned[0] and warned[0].endswith("step-2 is intact")
    with pytest.raises(SaveFailed, match=r"checkpoint of step 5 could not be written: .*no room; .*step-2 is intact"):
        saver.save_last(state, Progress(5, LOADER))
    monkeypatch.undo()
    assert saver.newest_step == 2
    saver.save(state, Progress(6, LOADER))
    saver.wait()
    assert saver.newest_step == 6
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-2", "step-6"]


@BOTH
def test_a_failure_of_before_save_writes_no_checkpoint(asynchronous, opened, model_and_optimizer, tmp_path) -> None:
    saver, state = opened(asynchronous), tensors(*model_and_optimizer, CPU)

    def full() -> None:
        raise OSError(28, "no room for the metrics")

    saver.before_save = full
    with pytest.raises(CannotSave, match="no room for the metrics"):
        saver.start(state, Progress(2, LOADER))
    saver.wait()
    assert find_latest(tmp_path / "checkpoints") is None


def test_a_saver_finds_existing_checkpoints(opened, model_and_optimizer) -> None:
    saver = opened(asynchronous=False)
    saver.save(tensors(*model_and_optimizer, CPU), Progress(3, LOADER))
    again = opened(asynchronous=False)
    assert again.newest_step == saver.newest_step == 3 and again.latest() == saver.latest()
    written = again.latest().stat().st_mtime_ns
    again.save(tensors(*model_and_optimizer, CPU), Progress(3, LOADER))
    again.save_last(tensors(*model_and_optimizer, CPU), Progress(3, LOADER))
    assert again.latest().stat().st_mtime_ns == written


def test_a_checkpoint_is_due_every_n_steps(tmp_path) -> None:
    due = {every: Saver(tmp_path, [], CheckpointConfig(every=every), print) for every in (0, 3)}
    assert [step for step in range(1, 8) if due[3].is_due(step)] == [3, 6]
    assert not any(due[0].is_due(step) for step in range(1, 8))
