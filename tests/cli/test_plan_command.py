"""`sightline plan`, as a user calls it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sightline.cli.main import run as command
from sightline.cli.plan import main
from sightline.cli.show_plan import busiest, received
from sightline.config import DataConfig
from sightline.masks import causal, document
from sightline.parallel import plan_context
from sightline.recipes import RECIPES, get_recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """llama3-debug on forty short documents."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"document {number} says: " + "some words and more " * (number % 7))
    run = get_recipe("llama3-debug")
    monkeypatch.setitem(RECIPES, "llama3-small", replace(run, data=DataConfig(source=str(folder))))
    return "llama3-small"


def lines_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"^(\S.*?) {2,}(\S.*?) *$", text, re.MULTILINE))


@pytest.mark.parametrize("argv", [[], ["--help"], ["llama3-tiny", "-h"]])
def test_help_teaches(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(argv)
    out = capsys.readouterr().out
    assert out.startswith("usage: sightline plan RECIPE") and "How to read it" in out and "H100 NVL" in out


def test_one_process_in_bytes(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([recipe])
    out = capsys.readouterr().out
    assert out.startswith("llama3-small, 139.6 K parameters, on 1 process\na step is 4 rows of 256 tokens, 4 a process")
    lines = lines_of(out)
    assert lines["weights"] == "545.2 KiB   139,584 of the parameters" and lines["moments"] == "1.065 MiB"
    assert "receives" not in out and "bubble" not in out


def test_a_mesh_of_everything(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([
        recipe, "--processes", "8", "--parallel.tensor", "2", "--parallel.pipeline", "2",
        "--training.micro-batch-size", "1", "--gpu", "A100",
    ])  # fmt: skip
    out = capsys.readouterr().out
    assert "on 8 processes: pipeline 2 x shard 2 x tensor 2" in out
    for kind in ("weights gathered", "gradients scattered", "tensor, between layers", "pipeline, stage to stage"):
        assert kind in out
    assert re.search(r"process 0 +0 +1 .*\n +process 1 +4 +1 ", out)
    assert "bubble: 33.3% of the time is waiting, 1F1B with 2 microbatches" in out
    assert "shortest step on A100" in out


def test_context_orders_and_picture(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "plan.png"
    main([recipe, "--parallel.context", "2", "--rows", "3", "--picture", str(picture)])
    out = capsys.readouterr().out
    assert "on 2 processes: context 2" in out and "of 3 rows of 256 tokens" in out
    degrees = re.findall(r"^ +(\d+) +(balanced|contiguous|headtail|roundrobin) ", out, re.MULTILINE)
    assert [d for d, order in degrees if order == "balanced"] == ["2", "8", "64"] and len(degrees) == 12
    assert picture.read_bytes().startswith(b"\x89PNG") and out.endswith(f"wrote {picture}\n")


def test_shares_of_a_context_plan() -> None:
    mask = causal(1, 8) & document(torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]))
    apart = plan_context(mask, 2, "contiguous")
    assert received(apart, "attention") == 0.0 and busiest(apart, {"attention": 1}) == 1.0
    whole = plan_context(causal(1, 8), 2, "contiguous")  # of 8 keys all-gathered, 4 are seen
    assert received(whole, "attention") == 0.5
    assert busiest(whole, {"attention": 3}) == pytest.approx((5 + 6 + 7 + 8) / 18)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["llama9-tiny"], "unknown recipe 'llama9-tiny'"),
        (["--processes", "4"], "the recipe is missing"),
        (["llama3-debug", "--gpu", "Z80"], "unknown --gpu 'Z80'; the GPUs whose speed is known: B200"),
        (["llama3-debug", "--processes", "-1"], "--processes must be greater than 0, got -1"),
        (["llama3-debug", "--picture", "x.png"], "--picture draws context parallelism; give --parallel.context"),
        (["llama3-debug", "--processes", "4", "--parallel.tensor", "3"], "tensor 3 is 3, which does not divide the 4"),
        (["llama3-debug", "--parallel.expert", "2", "--parallel.context", "2"], "has no experts"),
    ],
)
def test_refusals(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(argv)


def test_a_refusal_is_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["plan", "llama3-debug", "--processes", "4", "--parallel.tensor", "3"]) == 2
    assert capsys.readouterr().err.startswith("error: tensor 3 is 3")


@pytest.mark.parametrize(
    ("environment", "heard"),
    [({}, "error: "), ({"RANK": "3", "LOCAL_RANK": "3"}, ""), ({"RANK": "8", "LOCAL_RANK": "0"}, "[rank 8] error: ")],
)
def test_before_they_meet_one_process_of_a_machine_speaks(
    environment: dict[str, str], heard: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert command(["train", "nonsense"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(heard) and bool(said) == bool(heard)
