"""`sightline masks` on recipes, runs and mask expressions."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sightline.cli.masks import main
from sightline.cli.show_masks import find_mask_source
from sightline.config import DataConfig, Run
from sightline.data import load_documents, open_loader, split_documents, train_tokenizer
from sightline.masks import causal, document
from sightline.numbers import flops
from sightline.recipes import RECIPES, get_recipe
from sightline.training.run_directory import RunDirectory, settings

EXPRESSION = "causal(1, 16) & document(documents(5, 9, padding=2))"
DEBUG_RECIPES = [name for name in RECIPES if name.endswith("-debug")]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Forty documents of different lengths."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02}.txt").write_text(f"document {number} says: " + "some words and more " * (number % 7))
    return folder


def small(recipe: Run, source: Path) -> Run:
    return replace(recipe, data=DataConfig(source=str(source)), training=replace(recipe.training, sequence_length=96))


@pytest.fixture
def recipe(source: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(RECIPES, "llama3-small", small(get_recipe("llama3-debug"), source))
    return "llama3-small"


@pytest.fixture
def run_directory(source: Path, tmp_path: Path) -> Path:
    """A run directory with the config and a tokenizer of its own, whose vocabulary is little more than the bytes."""
    run = small(get_recipe("llama3-debug"), source)
    directory = tmp_path / "run"
    directory.mkdir()
    RunDirectory(directory).write_config(settings(run))
    RunDirectory(directory).keep_tokenizer(train_tokenizer(load_documents(run.data), 260), None)
    return directory


def test_unused_mask_has_no_attention_flops(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small(get_recipe("qwen3_next-debug"), source)
    monkeypatch.setitem(RECIPES, "recurrent", replace(run, model=replace(run.model, full_attention_interval=9)))
    main(["recurrent", "--stats"])
    assert "0: no layer uses this mask" in capsys.readouterr().out


def test_plot_of_an_expression(capsys: pytest.CaptureFixture[str]) -> None:
    main([EXPRESSION])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "attention: S 16, K 1, 60 visible pairs (44.1% of causal)"
    assert lines[2] == "      ┌──────────┬─────────────────┬───"
    assert lines[7] == "    4 │██████████ · · · · · · · · · · ·"


def test_width_option(capsys: pytest.CaptureFixture[str]) -> None:
    main(["causal(1, 4096)", "--width", "30"])
    picture = capsys.readouterr().out.split("\n", 1)[1]
    assert max(len(line) for line in picture.splitlines()) == 30


def test_statistics_of_an_expression(capsys: pytest.CaptureFixture[str]) -> None:
    main(["document([[0, 0, 0, 1], [0, 1, 2, 2]])", "--stats", "--block-size", "2", "--row", "1"])
    text = capsys.readouterr().out
    assert "attention, row 1 of 2: S 4, K 1, 6 visible pairs (60.0% of causal)" in text
    rows = dict(re.findall(r"^(\S.*?) {2,}(\S.*?) *$", text, re.MULTILINE))
    assert rows["rows, queries, keys"] == "2, 4, 4"
    assert rows["visible pairs per row"] == "8 (6 to 10)"
    assert rows["share of causal"] == "80.00%"
    assert rows["sparsity"] == "50.00%"
    assert [rows[f"blocks of 2, {state}"] for state in ("full", "partial", "empty")] == [
        "2 (25.0%)", "4 (50.0%)", "2 (25.0%)",
    ]  # fmt: skip
    assert "FLOP" not in text


def test_recipe_gives_its_first_training_batch(recipe: str, source: Path) -> None:
    run = RECIPES[recipe]
    training, _ = split_documents(load_documents(run.data), run.data.validation_fraction)
    tokenizer = train_tokenizer(training, run.model.vocab_size)
    loader = open_loader(run.data, run.training, training, tokenizer, seed=run.seed)
    batch = next(loader)
    loader.close()
    mask_source = find_mask_source(recipe, None)
    assert list(mask_source.masks) == ["attention"]
    assert batch.document_ids.amax() > 1
    assert mask_source.masks["attention"].equal(causal(*batch.shape) & document(batch.document_ids))
    assert mask_source.batch is not None and torch.equal(mask_source.batch.tokens, batch.tokens)


def test_run_directory_uses_its_own_tokenizer(recipe: str, run_directory: Path) -> None:
    recipe_masks, run_masks = find_mask_source(recipe, None), find_mask_source(str(run_directory), None)
    assert run_masks.batch is not None and int(run_masks.batch.tokens.max()) < 260
    assert not run_masks.masks["attention"].equal(recipe_masks.masks["attention"])


def test_sequence_length_option(recipe: str, run_directory: Path) -> None:
    for what in (recipe, str(run_directory)):
        assert find_mask_source(what, 40).masks["attention"].shape == (4, 40, 40)


def test_flops_of_a_step(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """llama3-debug has 2 layers, 4 heads of 16 channels, 2 key/value heads; 12 FLOPs per pair, head and channel."""
    pairs = int(find_mask_source(recipe, None).masks["attention"].visible_pairs().sum())
    main([recipe, "--stats"])
    rows = dict(re.findall(r"^(\S.*?) {2,}(\S.*?) *$", capsys.readouterr().out, re.MULTILINE))
    attention, tokens = pairs * 12 * 4 * 16 * 2, 4 * 96
    assert rows["attention FLOPs, all layers"] == flops(attention)
    assert rows["per layer (2 layers)"] == flops(attention / 2)
    assert rows["per head group (2 in a layer)"] == flops(attention / 4)
    # hidden size 64: in each of 2 layers q and o 64 x 64, k and v 64 x 32, three 64 x 128; output projection 512 x 64
    matmul = tokens * 6 * (2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128) + 512 * 64)
    assert rows["tokens"] == f"{tokens} (100.0% of the rows)"
    assert rows["matrix products"] == flops(matmul)
    assert rows["total"] == flops(matmul + attention)
    causal_rows = matmul + 4 * 96 * 97 / 2 * 12 * 4 * 16 * 2
    assert rows["with plain causal rows"].startswith(flops(causal_rows))


@pytest.mark.parametrize("name", DEBUG_RECIPES)
def test_every_family_has_masks(
    name: str, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RECIPES, name, small(get_recipe(name), source))
    main([name, "--stats"])
    assert "FLOP" in capsys.readouterr().out


def test_png_and_html_files(tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    png, html = tmp_path / "new" / "masks.png", tmp_path / "new" / "masks.html"
    main([recipe, "--png", str(png), "--html", str(html), "--row", "3", "--block-size", "32"])
    assert png.read_bytes().startswith(b"\x89PNG")
    found = re.search(r'type="application/json">(.*?)</script>', html.read_text(), re.DOTALL)
    assert found
    data = json.loads(found.group(1))
    assert (data["title"], data["row"], data["block_size"]) == ("llama3-small, first batch", 3, 32)
    assert "attention FLOPs, all layers" in data["masks"][0]["facts"]
    assert capsys.readouterr().out.endswith(f"wrote {png}\nwrote {html}\n")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["llama9-tiny"],
            r"'llama9-tiny' is not a recipe, a run directory, or a mask expression .* recipes are: llama3-debug, ",
        ),
        (["window(1, 4)"], "unknown name 'window'"),
        ([EXPRESSION, "--row", "1"], "row 1 is not in this mask of 1 rows"),
        ([EXPRESSION, "--row", "-1"], "--row must be at least 0, got -1"),
        ([EXPRESSION, "--width", "5"], "--width must be at least 24, got 5"),
        ([EXPRESSION, "--block-size", "0"], "--block-size must be at least 1, got 0"),
        ([EXPRESSION, "--sequence-length", "32"], "--sequence-length applies to recipes and runs"),
        ([EXPRESSION, "--png", "masks.nothing"], "Format 'nothing' is not supported"),
        ([EXPRESSION, "--html", "/dev/null/masks.html"], "cannot write /dev/null/masks.html: .*choose another path"),
    ],
)
def test_wrong_arguments_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(argv)


def test_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run directory: it has no config"):
        main([str(tmp_path)])
