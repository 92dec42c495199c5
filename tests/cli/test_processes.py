"""The command as a process: signals from outside, exit codes, and text from what it left."""

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
        "train", "llama3-debug", "--output-dir", str(directory), "--data.source", str(source), "--model.hidden-size", "32",
        "--model.vocab-size", "320", "--training.steps", str(STEPS), "--training.sequence-length", "64",
        "--training.device", "cpu", "--checkpoint.every", "5", "--validation.every", "10", "--logging.sample-tokens",
        "8", "--logging.no-tensorboard",
    ]  # fmt: skip
    return subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def signal_after(directory: Path, process: subprocess.Popen, lines: int, signum: int) -> str:
    """Send `signum` once the metrics have so many lines; returns what the process said."""
    metrics, deadline = directory / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signum)
    return process.communicate(timeout=200)[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """One run left alone; one ended by SIGKILL, then by SIGTERM, then left alone."""
    base = tmp_path_factory.mktemp("runs")
    source = write_corpus(base / "texts")
    alone = start(base / "alone", source)
    said = alone.communicate(timeout=300)[0]
    assert alone.returncode == 0, said

    killed = start(base / "ended", source)
    signal_after(base / "ended", killed, 8, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    stopped = start(base / "ended", source)
    said = signal_after(base / "ended", stopped, 20, signal.SIGTERM)
    assert stopped.returncode == 128 + signal.SIGTERM, said
    assert "stopped by SIGTERM after step" in said and "The same command continues" in said
    assert "Traceback" not in said
    last = start(base / "ended", source)
    said = last.communicate(timeout=300)[0]
    assert last.returncode == 0 and "continued from step-" in said, said
    return {"alone": base / "alone", "ended": base / "ended"}


def test_ended_from_outside_and_resumed_is_the_same_run(runs) -> None:
    assert len(rows_of(runs["alone"])) == STEPS
    assert rows_of(runs["ended"]) == rows_of(runs["alone"])


def test_generate_continues_the_prompt(runs, capsys) -> None:
    texts = []
    for seed in ("3", "3", "4"):
        generate.main([str(runs["alone"]), "--prompt", "def return", "--max-new-tokens", "12", "--seed", seed])
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("def return") and len(text) > len("def return\n") for text in texts)


def test_generate_takes_a_checkpoint_too(runs, capsys) -> None:
    checkpoint = runs["alone"] / "checkpoints" / f"step-{STEPS}"
    generate.main([str(checkpoint), "--prompt", "if ", "--max-new-tokens", "0"])
    assert capsys.readouterr().out == "if \n"


def test_generate_refuses_what_is_no_run(runs, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"is not a checkpoint: it has no manifest\.json"):
        generate.main([str(tmp_path)])
