"""The command as a process: signals, exit codes, resuming, and generation from the finished run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sightline.cli import generate
from tests.support.small_runs import rows_of, write_corpus

STEPS = 40


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sightline", *arguments]


def start(directory: Path, source: Path) -> subprocess.Popen:
    arguments = [
        "train", "llama3-debug", "--output-dir", str(directory), "--data.source", str(source),
        "--model.hidden-size", "32", "--model.vocab-size", "320", "--training.steps", str(STEPS),
        "--training.sequence-length", "64", "--training.device", "cpu", "--checkpoint.every", "5",
        "--validation.every", "10", "--logging.sample-tokens", "8", "--logging.no-tensorboard",
    ]  # fmt: skip
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def signal_after(directory: Path, process: subprocess.Popen, lines: int, signum: int) -> str:
    """Send `signum` when metrics.jsonl has `lines` lines; return the output of the process."""
    metrics, deadline = directory / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signum)
    return process.communicate(timeout=200)[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """One run without interruption, and one that was killed by SIGKILL, stopped by SIGTERM, then finished."""
    base = tmp_path_factory.mktemp("runs")
    source = write_corpus(base / "texts")
    uninterrupted = start(base / "uninterrupted", source)
    output = uninterrupted.communicate(timeout=300)[0]
    assert uninterrupted.returncode == 0, output

    killed = start(base / "interrupted", source)
    signal_after(base / "interrupted", killed, 8, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    stopped = start(base / "interrupted", source)
    output = signal_after(base / "interrupted", stopped, 20, signal.SIGTERM)
    assert stopped.returncode == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM after step" in output and "The same command continues" in output
    assert "Traceback" not in output
    last = start(base / "interrupted", source)
    output = last.communicate(timeout=300)[0]
    assert last.returncode == 0 and "continued from step-" in output, output
    return {"uninterrupted": base / "uninterrupted", "interrupted": base / "interrupted"}


def test_interrupted_and_resumed_run_equals_uninterrupted(runs) -> None:
    assert len(rows_of(runs["uninterrupted"])) == STEPS
    assert rows_of(runs["interrupted"]) == rows_of(runs["uninterrupted"])


def test_generate_continues_the_prompt(runs, capsys) -> None:
    texts = []
    for seed in ("3", "3", "4"):
        generate.main([str(runs["uninterrupted"]), "--prompt", "def return", "--max-new-tokens", "12", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("def return") and len(text) > len("def return\n") for text in texts)


def test_generate_from_a_checkpoint(runs, capsys) -> None:
    checkpoint = runs["uninterrupted"] / "checkpoints" / f"step-{STEPS}"
    generate.main([str(checkpoint), "--prompt", "if ", "--max-new-tokens", "0"])
    assert capsys.readouterr().out == "if \n"


def test_generate_refuses_a_directory_without_a_run(runs, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"is not a checkpoint: it has no manifest\.json"):
        generate.main([str(tmp_path)])
