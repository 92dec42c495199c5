"""Benchmarks inside transformers: their contestants compute the same, and their commands run in small."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import hf_loss, hf_shared_prompt, huggingface, timing


@pytest.fixture(autouse=True)
def short_documents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    threads = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    row = [torch.randint(2, 8192, (n,), generator=generator).tolist() for n in (30, 50, 48)]
    monkeypatch.setattr(huggingface, "documents_of", lambda length: [row] * 3)
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", ["trl", "trainer", "gemma2"])
def test_contestants_have_equal_losses(case: str) -> None:
    maker = huggingface.model_step if case == "gemma2" else huggingface.trainer_step
    losses = [maker(case, contestant, 128)() for contestant in ("stock", "sightline", "fused")]
    assert losses[1:] == pytest.approx(losses[:1] * 2, abs=2e-5)


def test_stock_gpt_oss_leaks() -> None:
    stock, ours, fused = (huggingface.model_step("gpt_oss", name, 128)() for name in ("stock", "sightline", "fused"))
    assert ours == pytest.approx(fused, abs=2e-5) and abs(stock - ours) > 1e-4


@pytest.mark.parametrize("trainer", ["Trainer", "TRL"])
def test_fused_loss_equals_the_stock_loss(trainer: str) -> None:
    stock, fused = (hf_loss.build_step(trainer, fused, 64)() for fused in (False, True))
    assert stock == pytest.approx(fused, abs=1e-5)


def test_shared_prompt_in_small(tmp_path: Path) -> None:
    hf_shared_prompt.main(["--prompt", "24", "--responses", "3", "--response", "5", "--rounds", "1"])
    trl, shared = json.loads((tmp_path / "hf_shared_prompt.json").read_text())["rows"]
    assert trl["loss"] == pytest.approx(shared["loss"], abs=1e-5) and trl["seconds"] > 0


@pytest.mark.slow
def test_commands_in_small(tmp_path: Path) -> None:
    huggingface.main(["--only", "trainer", "--lengths", "256", "--rounds", "1"])
    rows = json.loads((tmp_path / "huggingface.json").read_text())["rows"]
    assert [row["contestant"] for row in rows] == ["stock", "sightline", "fused"]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    hf_loss.main(["--length", "256", "--rounds", "1"])
    rows = json.loads((tmp_path / "hf_loss.json").read_text())["rows"]
    assert [row["trainer"] for row in rows] == ["Trainer", "TRL"] and all(row["fused"] > 0 for row in rows)


def test_mask_work() -> None:
    assert 0 < huggingface.mask_work(128) < 1
