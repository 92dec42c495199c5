"""`sightline plan`, as a user calls it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sightline.cli.main import run as command
from sightline.cli.plan import main
from sightline.cli.show_plan import least_fraction, received_fraction, work_imbalance
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
def test_help(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(argv)
    out = capsys.readouterr().out
    assert out.startswith("usage: sightline plan RECIPE") and "How to choose a mesh" in out and "H100 NVL" in out


def test_memory_of_one_rank(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([recipe])
    out = capsys.readouterr().out
    assert out.startswith("llama3-small, 139.6 K parameters, on 1 rank\nglobal batch 4 rows of 256 tokens; per data-")
    lines = lines_of(out)
    assert lines["parameters"] == "545.2 KiB   139,584 parameters" and lines["optimizer state"] == "1.065 MiB"
    assert "received" not in out and "bubble" not in out


def test_tables_of_a_mesh(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    main([
        recipe, "--processes", "8", "--parallel.tensor", "2", "--parallel.pipeline", "2",
        "--training.micro-batch-size", "1", "--gpu", "A100",
    ])  # fmt: skip
    out = capsys.readouterr().out
    assert "on 8 ranks: pipeline 2 x shard 2 x tensor 2" in out
    for kind in (
        "all-gather parameters",
        "reduce-scatter gradients",
        "tensor parallel hidden states",
        "pipeline send/recv",
    ):
        assert kind in out
    assert re.search(r"\n +0 +0 +1 .*\n +1 +4 +1 ", out)
    assert "bubble: 33.3% of the step, 1F1B with 2 micro-batches" in out
    assert "shortest step on A100" in out


def test_context_orders_and_picture(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "plan.png"
    main([recipe, "--parallel.context", "2", "--rows", "3", "--picture", str(picture)])
    out = capsys.readouterr().out
    assert "on 2 ranks: context 2" in out and "of 3 rows of 256 tokens" in out
    degrees = re.findall(r"^ +(\d+) +(balanced|contiguous|headtail|roundrobin) ", out, re.MULTILINE)
    assert [d for d, order in degrees if order == "balanced"] == ["2", "8", "64"] and len(degrees) == 12
    assert picture.read_bytes().startswith(b"\x89PNG") and out.endswith(f"wrote {picture}\n")


def test_the_reason_for_a_plan_far_from_the_lower_bound(capsys: pytest.CaptureFixture[str]) -> None:
    main(["llama3-debug", "--parallel.context", "2", "--rows", "2"])
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.split()[1:2] == ["balanced"]]
    far = [degree for degree, _, _, keys, least, *_ in rows if float(keys[:-1]) > 1.31 * float(least[:-1])]
    near = [degree for degree, _, _, keys, least, *_ in rows if float(keys[:-1]) < 1.29 * float(least[:-1])]
    named = re.findall(r"times the lower bound with context ([\d, ]+):", out)
    listed = named[0].split(", ") if named else []
    assert rows and set(far) <= set(listed) and not set(near) & set(listed)


def test_received_fraction_and_work_imbalance() -> None:
    mask = causal(1, 8) & document(torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]))
    separate = plan_context(mask, 2, "contiguous")
    assert received_fraction(separate, "attention") == 0.0 and work_imbalance(separate, {"attention": 1}) == 1.0
    assert least_fraction(separate, "attention") == 0.0
    full_row = plan_context(causal(1, 8), 2, "contiguous")  # an all-gather receives 8 keys, of which 4 are visible
    assert received_fraction(full_row, "attention") == least_fraction(full_row, "attention") == 0.5
    assert work_imbalance(full_row, {"attention": 3}) == pytest.approx((5 + 6 + 7 + 8) / 18)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["llama9-tiny"], "unknown recipe 'llama9-tiny'"),
        (["--processes", "4"], "the recipe is missing"),
        (["llama3-debug", "--gpu", "Z80"], "unknown --gpu 'Z80'; known GPUs: B200"),
        (["llama3-debug", "--processes", "-1"], "--processes must be greater than 0 and at most .*, got -1"),
        (["llama3-debug", "--picture", "x.png"], "--picture plots context parallelism; set --parallel.context"),
        (["llama3-debug", "--processes", "4", "--parallel.tensor", "3"], "tensor 3 is 3, which does not divide the 4"),
        (["llama3-debug", "--parallel.expert", "2", "--parallel.context", "2"], "has no experts"),
    ],
)
def test_errors(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(argv)


def test_an_error_sets_the_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["plan", "llama3-debug", "--processes", "4", "--parallel.tensor", "3"]) == 2
    assert capsys.readouterr().err.startswith("error: tensor 3 is 3")


@pytest.mark.parametrize(
    ("environment", "prefix"),
    [({}, "error: "), ({"RANK": "3", "LOCAL_RANK": "3"}, ""), ({"RANK": "8", "LOCAL_RANK": "0"}, "[rank 8] error: ")],
)
def test_one_rank_per_machine_reports_errors_before_initialization(
    environment: dict[str, str], prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert command(["train", "nonsense"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(prefix) and bool(err) == bool(prefix)
