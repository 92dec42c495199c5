"""`python -m benchmarks.gpu`: its parts run in small on a CPU, and a part that fails loses nothing of the others."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.checks import read_outcomes
from benchmarks.gpu.parts import PARTS, ROOT, read_rows, run_part
from benchmarks.gpu.report import to_markdown, to_table
from benchmarks.gpu.steps import TINY, Trained, fitting_layers
from sightline.models import build_skeleton, config_of

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def smoke(output: Path, *parts: str) -> dict:
    """Run parts in small, and return their results by name."""
    options = ["--smoke", "--output", str(output), "--parts", *parts]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *options], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (output / "gpu.md").read_text().strip() in done.stdout
    return json.loads((output / "gpu.json").read_text())["parts"]


def test_a_part_in_small(tmp_path: Path) -> None:
    rows = smoke(tmp_path, "step-8b")["step-8b"]["rows"]
    steps = {row["contestant"]: row for row in rows if not row.get("provisional")}
    assert steps["auto"]["layers"] == 2 and steps["auto"]["tokens/s"] > 0
    assert steps["auto"]["auto is faster by"] == "1.00x" and "%" in steps["dense mask"]["MFU of visible pairs"]
    # FlexAttention does not train on a CPU: the error is recorded, and the other contestants are timed.
    assert "flex does not train on a CPU" in steps["create_block_mask"]["error"]
    assert "### A training step, layers of an 8B model" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_all_parts_in_small(tmp_path: Path) -> None:
    parts = smoke(tmp_path, *PARTS)
    assert list(parts) == list(PARTS) and {part["status"] for part in parts.values()} == {"finished"}
    rows = {name: part["rows"] for name, part in parts.items()}
    assert [row["outcome"] for row in rows["tests"]] == ["passed", "failed", "skipped"]
    assert sum(row["count"] for row in rows["tests"]) > 0
    documents, *_ = (row for row in rows["kernels"] if "pairs" in row)
    assert documents["flex, ms"] > 0 and documents["dense mask, ms"] > 0 and documents["varlen, ms"] == "not supported"
    assert all(rows["kernels"][-1][name] > 0 for name in ("ours, ms", "closure, ms"))
    errors = [row["relative error"] for row in rows["kernels"] if "relative error" in row]
    assert len(errors) == 2 and max(errors) < 1e-5
    contestants = {row["contestant"]: row for row in rows["step-125m"]}
    assert contestants["transformers, sdpa, not compiled"]["tokens/s"] > 0
    assert rows["recompiles"][0]["graphs"] == rows["recompiles"][0]["expected"]
    assert rows["recompiles"][1]["graphs of the later steps"] == 0
    assert rows["masks"][0]["create_block_mask, ms"] > 0
    assert rows["kernels-long"][0]["S"] == 512


def test_time_limits() -> None:
    assert sum(part.seconds for part in PARTS.values()) <= command.TOTAL_SECONDS < 540
    assert all(part.seconds <= 120 for part in PARTS.values())


def program(tmp_path: Path, text: str, seconds: float) -> dict:
    """Run a program as a part, with `rows` as the path of its measurements."""
    rows = tmp_path / "part.jsonl"
    return run_part([sys.executable, "-c", f"rows = {str(rows)!r}\n{text}"], rows, seconds)


WRITE = "import os, sys, time, subprocess\nopen(rows, 'a').write('{\"ms\": 1.5}\\n')\n"


def test_a_crash_keeps_what_was_measured(tmp_path: Path) -> None:
    result = program(tmp_path, WRITE + "print('about to end', flush=True)\nos.abort()", 30)
    assert result["status"].startswith("failed with exit code") and result["rows"] == [{"ms": 1.5}]
    assert "about to end" in result["log"]
    assert program(tmp_path, "", 30) == {"status": "finished", "seconds": pytest.approx(0, abs=20), "rows": []}


def test_a_hang_is_stopped_with_its_processes(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    hang = f"open({str(pid)!r}, 'w').write(str(child.pid))\nopen(rows, 'a').write('{{\"half')\ntime.sleep(60)"
    begin = time.monotonic()
    result = program(tmp_path, WRITE + child + hang, 3)
    assert time.monotonic() - begin < 20
    assert result["status"] == "stopped after 3 s" and result["rows"] == [{"ms": 1.5}]
    state = Path(f"/proc/{pid.read_text()}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_other_parts_run_after_a_part_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(name: str, rows: Path, seconds: float, *, smoke: bool) -> list[str]:
        return [sys.executable, "-c", "raise SystemExit(3)" if name == "kernels" else f"open({str(rows)!r}, 'w')"]

    monkeypatch.setattr(command, "command_of", fake)
    assert not command.run_parts(["kernels", "masks"], tmp_path, smoke=True)
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "kernels": "failed with exit code 3", "masks": "finished",
    }  # fmt: skip
    monkeypatch.setattr(command, "TOTAL_SECONDS", 1.0)
    assert not command.run_parts(["masks"], tmp_path, smoke=True)
    assert "no time left" in (tmp_path / "gpu.md").read_text().lower()


def test_errors_and_lack_of_memory_are_recorded(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "rows.jsonl", 60, smoke=True)
    with bench.attempt(S=1):
        raise torch.OutOfMemoryError("tried to allocate")
    with bench.attempt(S=2):
        raise ValueError("first line\nsecond line")

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    contestants = {"a": out_of_memory, "b": lambda: None}
    assert bench.warm_up(contestants) == {"a": "out of memory"} and list(contestants) == ["b"]
    assert list(bench.in_turn(contestants)) == ["b"]
    bench.deadline = time.monotonic()
    assert not bench.has_time(1, S=3)
    assert [row["error"] for row in read_rows(bench.file)] == [
        "out of memory", "ValueError: first line second line", "left out: no time left",
    ]  # fmt: skip


def test_outcomes_of_the_tests_marked_gpu(tmp_path: Path) -> None:
    (tmp_path / "test_few.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\ndef test_c(): pytest.skip()\n"
    )
    report = tmp_path / "report.xml"
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), f"--junitxml={report}", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=tmp_path, capture_output=True, check=False)
    *counts, failure = read_outcomes(report)
    assert counts == [{"outcome": name, "count": 1} for name in ("passed", "failed", "skipped")]
    assert str(failure["detail"]).startswith("test_b") and "1 == 2" in str(failure["detail"])


def test_markdown() -> None:
    rows: list[dict[str, Any]] = [
        {"contestant": "a", "ms": 1234.5, "provisional": True},
        {"contestant": "b", "error": "out of memory"},
        {"contestant": "a", "ms": 1.23456, "share": "10%"},
        {"contestant": "c", "ms": 7.0, "provisional": True},
    ]
    assert to_table(rows) == [
        "| contestant | ms | share | error |",
        "| --- | --- | --- | --- |",
        "| b |  |  | out of memory |",
        "| a | 1.23 | 10% |  |",
        "| c | 7 |  |  |",
    ]
    machine = {"device": "H100", "memory_gib": 79.6, "driver": "580.1", "cuda": "13.0", "torch": "2.11.0"}
    text = to_markdown(machine, {"masks": {"status": "stopped after 3 s", "rows": [{"table": "Times", "S": 1}]}})
    assert "on H100 (79.6 GiB, driver 580.1, CUDA 13.0), torch 2.11.0." in text
    assert "### Mask making\n\nStopped after 3 s; what was measured until then:\n\nTimes:\n\n| S |" in text


def test_layers_of_the_8b_model_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights in float32, their gradients and the state of AdamW take 16 bytes a parameter."""
    config = config_of("llama3-8b")
    layer = sum(p.numel() for p in build_skeleton(replace(config, num_layers=1)).layers.parameters())
    ends = 2 * config.vocab_size * config.hidden_size
    layers = {}
    for gib in (40, 80, 141):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gib=gib: (gib * 2**30, gib * 2**30))
        layers[gib] = fitting_layers(config, 8192)
        assert 16 * (ends + layers[gib] * layer) < gib * 2**30
    assert 1 <= layers[40] < layers[80] < layers[141] <= config.num_layers
    assert 18 * (ends + 2 * layers[80] * layer) > 80 * 2**30  # twice as many do not fit, with weights in bfloat16


def test_flops_of_a_step_count_visible_pairs(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "rows.jsonl", 60, smoke=True)
    trained = Trained(bench, TINY, rows=2, length=64, layouts=2, compiled=False)
    parameters = sum(p.numel() for name, p in trained.model.named_parameters() if p.dim() == 2)  # tied embeddings
    pairs = 0
    for batch in trained.batches:
        same = batch.document_ids[:, :, None] == batch.document_ids[:, None, :]
        pairs += int((same & torch.ones(64, 64, dtype=torch.bool).tril()).sum())
    expected = 6 * parameters * 2 * 2 * 64 + 12 * pairs * TINY.hidden_size * TINY.num_layers
    assert trained.flops() == pytest.approx(expected)
