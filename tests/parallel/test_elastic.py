"""Real torchrun jobs whose processes are killed or asked to leave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sightline.training.signals import StopRequest
from sightline.training.trainer import Trainer
from tests.support.small_runs import rows_of, write_corpus

STEPS = 40


def start(directory: Path, source: Path, *options: str) -> subprocess.Popen[str]:
    """A job of two processes that restarts once; what they say lies beside its directory."""
    arguments = [
        "train", "llama3-debug", "--output-dir", str(directory), "--data.source", str(source), "--model.hidden-size", "32",
        "--model.vocab-size", "320", "--training.steps", str(STEPS), "--training.sequence-length", "64",
        "--training.micro-batch-size", "2", "--training.device", "cpu", "--checkpoint.every", "5",
        "--validation.every", "0", "--logging.sample-tokens", "0", "--logging.no-tensorboard", *options,
    ]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*torchrun, "--max-restarts", "1", "-m", "sightline", *arguments],
        stdout=directory.with_suffix(".log").open("w"),
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )


def said(directory: Path) -> str:
    return directory.with_suffix(".log").read_text()


def wait_for_lines(directory: Path, job: subprocess.Popen[str], lines: int) -> None:
    metrics, deadline = directory / "metrics.jsonl", time.monotonic() + 300
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert job.poll() is None and time.monotonic() < deadline, said(directory)
        time.sleep(0.005)


def process_of(job: subprocess.Popen[str], rank: int) -> int:
    """The process id of a rank: the child of torchrun whose environment says so."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no rank {rank} among {children}")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the processes in /proc")
def test_a_killed_rank_restarts_the_job_with_the_same_losses(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "texts")
    undisturbed = start(tmp_path / "alone", source)
    assert undisturbed.wait(timeout=400) == 0, said(tmp_path / "alone")
    rows = rows_of(tmp_path / "alone")
    assert len(rows) == STEPS

    job = start(tmp_path / "killed", source)
    wait_for_lines(tmp_path / "killed", job, 8)
    os.kill(process_of(job, 1), signal.SIGKILL)
    assert job.wait(timeout=400) == 0, said(tmp_path / "killed")
    assert "continued from step-" in said(tmp_path / "killed")
    assert rows_of(tmp_path / "killed") == rows


def test_a_job_asked_to_leave_saves_and_says_so_once(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "texts")
    job = start(tmp_path / "run", source, "--checkpoint.every", "0")
    wait_for_lines(tmp_path / "run", job, 3)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=400) != 0
    text = said(tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert text.count(f"saved in {checkpoint}. The same command continues") == 1, text
    assert f"stopped by SIGTERM after step {checkpoint.name.removeprefix('step-')};" in text
    assert len(rows_of(tmp_path / "run")) == int(checkpoint.name.removeprefix("step-"))


def test_a_signal_that_comes_while_processes_meet_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, here = StopRequest(), Trainer.__new__(Trainer)
    here.step = 3

    def meeting(step: int, signum: int | None) -> int | None:
        stop.received = signal.SIGTERM  # as the handler would while this process waits for the others
        return signum

    monkeypatch.setattr("sightline.training.trainer.meet", meeting)
    assert not here.stops(stop) and stop.received == signal.SIGTERM
    assert here.stops(stop)


@pytest.mark.slow
def test_a_wrong_option_is_said_once(tmp_path: Path) -> None:
    job = start(tmp_path / "run", write_corpus(tmp_path / "texts"), "--parallel.tensor", "3")
    assert job.wait(timeout=400) != 0
    assert (
        said(tmp_path / "run").count("tensor 3 is 3, which does not divide the 2 processes started") == 2
    )  # a restart
