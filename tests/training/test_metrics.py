"""metrics.jsonl: truncated to the resumed step, robust to a kill and to a full disk; also TensorBoard and W&B."""

import json
import logging
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sightline import config
from sightline.training import metrics
from sightline.training.checkpoint import CannotSave
from sightline.training.metrics import Metrics, MetricsFile, check_wandb, read_metrics, start_wandb


def steps_of(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def test_one_object_per_line(tmp_path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", resumed_step=0)
    file.append({"step": 1, "loss": 2.5})
    file.append({"step": 2, "loss": 0.1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 0.1}\n'


def test_lines_after_the_resumed_step_are_dropped(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 8)))
    file = MetricsFile(path, resumed_step=4)
    assert steps_of(path) == [1, 2, 3, 4]
    file.append({"step": 5})
    assert steps_of(path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("tail", [b'{"step": 3, "lo', b'{"step": 3}', b"\0\0\0\n", b'{"step": 3, "loss": {"a": 1}'])
def test_incomplete_line_is_dropped(tail, tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + tail)
    assert steps_of(path) == [1, 2]
    MetricsFile(path, resumed_step=9).append({"step": 3, "loss": 1.0})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 1.0}\n'


def test_lines_are_kept_while_the_disk_is_full(tmp_path, monkeypatch, caplog) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, resumed_step=0)
    file.append({"step": 1})
    open_file = Path.open

    def half_full(self, mode="r"):
        with open_file(self, "ab") as stream:  # some bytes fit, then the disk is full
            stream.write(b'{"st')
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", half_full)
    with caplog.at_level(logging.WARNING):
        file.append({"step": 2})
    assert "No space left on device" in caplog.text
    with pytest.raises(CannotSave):
        file.sync()
    monkeypatch.undo()
    file.append({"step": 3})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def scalars(directory: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_shows_a_resumed_run_once(tmp_path) -> None:
    first = Metrics(tmp_path, config.LoggingConfig(), 0, {})
    for step in (1, 2, 3, 4):
        first.write({"step": step, "loss": 10.0 + step})
    first.close()
    second = Metrics(tmp_path, config.LoggingConfig(), 2, {})
    for step in (3, 4):
        second.write({"step": step, "loss": 20.0 + step})
    second.close()
    assert scalars(tmp_path / "tensorboard", "loss") == [(1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0)]


def test_without_tensorboard_there_is_none(tmp_path) -> None:
    Metrics(tmp_path, config.LoggingConfig(tensorboard=False), 0, {}).close()
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_that_is_not_installed_is_named(monkeypatch) -> None:
    monkeypatch.setattr(metrics, "wandb", None)
    with pytest.raises(
        ValueError, match=r"logging\.wandb 'p' needs the package wandb.*pip install 'sightline\[wandb\]'"
    ):
        check_wandb(config.LoggingConfig(wandb="p"))


def test_wandb_continues_the_same_run(tmp_path, monkeypatch) -> None:
    class Wandb:
        started: list = []  # noqa: RUF012

        def init(self, **options):
            self.started.append(options)

    monkeypatch.setattr(metrics, "wandb", Wandb())
    start_wandb(tmp_path, "p", {"seed": 1})
    start_wandb(tmp_path, "p", {"seed": 1})
    first, second = Wandb.started
    assert first == second
    assert first["resume"] == "allow" and len(first["id"]) == 8
