"""Real torchrun jobs whose ranks are killed or receive a stop signal."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sightline.errors import AnotherRankEnded, Stopped, exit_code_of
from sightline.training import trainer
from tests.support.processes import run_on_ranks
from tests.support.small_runs import rows_of, small_run, train_quietly, write_corpus

STEPS = 40
FORMS = {
    "static": ("--master-port", "{port}"),
    "standalone": ("--standalone",),
    "c10d": ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:{port}"),
}
"""Options of torchrun for each form of its rendezvous."""


def start(directory: Path, source: Path, *options: str, form: str = "static") -> subprocess.Popen[str]:
    """Start a job of two ranks that restarts at most once; its log is next to its directory."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = [option.format(port=port) for option in FORMS[form]]
    arguments = [
        "train", "llama3-debug", "--output-dir", str(directory), "--data.source", str(source),
        "--model.hidden-size", "32", "--model.vocab-size", "320", "--training.steps", str(STEPS),
        "--training.sequence-length", "64",
        "--training.micro-batch-size", "2", "--training.device", "cpu", "--checkpoint.every", "5",
        "--validation.every", "0", "--logging.sample-tokens", "0", "--logging.no-tensorboard", *options,
    ]  # fmt: skip
    torchrun = [sys.executable, "-m", "torch.distributed.run", *launch, "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*torchrun, "--max-restarts", "1", "-m", "sightline", *arguments],
        stdout=directory.with_suffix(".log").open("w"),
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def log_of(directory: Path) -> str:
    return directory.with_suffix(".log").read_text()


def wait_for_lines(directory: Path, job: subprocess.Popen[str], lines: int) -> None:
    metrics, deadline = directory / "metrics.jsonl", time.monotonic() + 300
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert job.poll() is None and time.monotonic() < deadline, log_of(directory)
        time.sleep(0.005)


def process_of(job: subprocess.Popen[str], rank: int) -> int:
    """Return the process id of a rank: the child of torchrun with this RANK in its environment."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no rank {rank} among {children}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The data, and the metrics of a job that nobody kills."""
    base = tmp_path_factory.mktemp("uninterrupted")
    source = write_corpus(base / "texts")
    job = start(base / "run", source)
    assert job.wait(timeout=400) == 0, log_of(base / "run")
    rows = rows_of(base / "run")
    assert len(rows) == STEPS
    return source, rows


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
@pytest.mark.parametrize(
    ("form", "rank"),
    [
        pytest.param(form, rank, marks=[] if (form, rank) == ("static", 0) else pytest.mark.slow)
        for form in FORMS
        for rank in range(2)
    ],
)
def test_job_restarts_once_after_a_killed_rank_with_the_same_losses(
    form: str, rank: int, uninterrupted: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    source, rows = uninterrupted
    job = start(tmp_path / "killed", source, form=form)  # torchrun ends a job that needs two restarts
    wait_for_lines(tmp_path / "killed", job, 8)
    os.kill(process_of(job, rank), signal.SIGKILL)
    assert job.wait(timeout=400) == 0, log_of(tmp_path / "killed")
    assert log_of(tmp_path / "killed").count("continued from step-") == 1
    assert rows_of(tmp_path / "killed") == rows


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the ranks in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_job_ends_soon_after_the_timeout_of_a_stopped_rank(rank: int, tmp_path: Path) -> None:
    job = start(
        tmp_path / "run", write_corpus(tmp_path / "texts"), "--parallel.timeout", "5", "--training.steps", "4000"
    )
    wait_for_lines(tmp_path / "run", job, 8)
    stopped = process_of(job, rank)
    os.kill(stopped, signal.SIGSTOP)
    begin = time.monotonic()
    while Path(f"/proc/{stopped}").exists():
        assert time.monotonic() - begin < 5 + 30, "torchrun waited 30 s before it killed the stopped rank"
        time.sleep(0.1)
    while "continued from step-" not in log_of(tmp_path / "run"):
        assert time.monotonic() - begin < 300, log_of(tmp_path / "run")
        time.sleep(0.1)
    job.kill()
    assert f"rank {rank} (shard {rank}) was last at step" in log_of(tmp_path / "run")


def test_stop_signal_saves_a_checkpoint_and_is_logged_once(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "texts")
    job = start(tmp_path / "run", source, "--checkpoint.every", "0")
    wait_for_lines(tmp_path / "run", job, 3)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=400) != 0
    text = log_of(tmp_path / "run")
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert text.count(f"saved in {checkpoint}. The same command continues") == 1, text
    assert f"stopped by SIGTERM after step {checkpoint.name.removeprefix('step-')};" in text
    assert len(rows_of(tmp_path / "run")) == int(checkpoint.name.removeprefix("step-"))


def stop_rank_1_in_step_3(rank: int, directory: Path, source: Path) -> tuple[int, int]:
    """Return the step after which this rank stopped, and the signal."""
    original, calls = trainer.train_step, []

    def step(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if rank == 1 and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    trainer.train_step = step
    with pytest.raises((Stopped, AnotherRankEnded)) as stopped:
        train_quietly(small_run(directory / "run", source))
    return len(calls), exit_code_of(stopped.value) - 128


def test_all_ranks_stop_after_the_step_in_which_one_receives_a_signal(tmp_path: Path) -> None:
    source = write_corpus(tmp_path / "texts")
    assert run_on_ranks(2, stop_rank_1_in_step_3, tmp_path, source, join=False) == [(3, signal.SIGTERM)] * 2
    assert len(rows_of(tmp_path / "run")) == 3


@pytest.mark.slow
def test_invalid_option_is_reported_once_per_start(tmp_path: Path) -> None:
    job = start(tmp_path / "run", write_corpus(tmp_path / "texts"), "--parallel.tensor", "3")
    assert job.wait(timeout=400) != 0
    error = "tensor 3 is 3, which does not divide the 2 processes started"
    assert log_of(tmp_path / "run").count(error) == 2  # the job restarts once
