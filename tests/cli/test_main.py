"""Commands, help texts, messages and exit codes."""

import signal
from pathlib import Path

import pytest

from sightline.attention import CHOICES
from sightline.cli import main as cli
from sightline.cli.train import parse
from sightline.errors import NonFiniteLoss, SaveFailed, Stopped
from sightline.recipes import RECIPES


def call(capsys, *argv: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(argv))
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err  # type: ignore[return-value]


@pytest.mark.parametrize("argv", [(), ("--help",), ("-h",)])
def test_help_lists_the_commands(argv, capsys) -> None:
    code, out, _ = call(capsys, *argv)
    assert code == 0
    for words in ("  train  ", "  generate  ", "  masks  ", "examples:\n  sightline train llama3-tiny"):
        assert words in out


def test_version(capsys) -> None:
    assert call(capsys, "--version") == (0, "sightline 0.2.0\n", "")


@pytest.mark.parametrize("argv", [("train",), ("train", "--help"), ("train", "-h")])
def test_train_help_lists_the_recipes(argv, capsys) -> None:
    code, out, _ = call(capsys, *argv)
    assert code == 0
    assert all(f"  {name} " in out for name in RECIPES)
    assert "examples:" in out and "sightline train RECIPE --help" in out


@pytest.mark.parametrize("name", ["llama3-tiny", "llama3-8b"])
def test_recipe_help_lists_every_option(name, capsys) -> None:
    code, out, _ = call(capsys, "train", name, "--help")
    assert code == 0
    for option in (
        "--output-dir", "--seed", "--model.num-layers", "--model.num-kv-heads", "--data.source", "--data.packing",
        "--training.steps", "--training.sequence-length", "--training.global-batch-size", "--training.micro-batch-size",
        "--training.deterministic", "--optimizer.learning-rate", "--optimizer.schedule", "--attention.backend",
        "--validation.every", "--checkpoint.every", "--checkpoint.resume", "--logging.wandb",
    ):  # fmt: skip
        assert option in out, option
    assert "Directory of the run." in out and "Tokens per row (S)." in out
    assert f"(default: runs/{name})" in out
    assert "examples:" in out


def test_options_set_the_run() -> None:
    run = parse([
        "llama3-tiny", "--output-dir", "x/y", "--seed", "7", "--training.steps", "12", "--training.sequence-length",
        "64", "--attention.backend", "reference", "--data.source", "some/path", "--checkpoint.every", "3",
        "--model.num-layers", "2", "--training.deterministic", "--data.tokenizer", "t.json",
        "--checkpoint.resume", "never",
    ])  # fmt: skip
    assert run.output_dir == Path("x/y") and run.seed == 7
    assert run.training.steps == 12 and run.training.sequence_length == 64 and run.training.deterministic
    assert run.attention.backend == "reference" and run.data.source == "some/path"
    assert run.checkpoint.every == 3 and run.checkpoint.resume == "never"
    assert run.model.num_layers == 2 and run.model.hidden_size == RECIPES["llama3-tiny"].model.hidden_size
    assert run.data.tokenizer == Path("t.json")


@pytest.mark.parametrize("name", CHOICES)
def test_every_backend_is_a_choice(name, capsys) -> None:
    assert parse(["llama3-debug", "--attention.backend", name]).attention.backend == name
    out = call(capsys, "train", "llama3-debug", "--help")[1]
    assert f"--attention.backend {{{','.join(CHOICES)}}}" in out


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_without_options_is_unchanged(name) -> None:
    assert parse([name]) == RECIPES[name]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("nonsense",), "unknown command 'nonsense'; the commands are: train, generate, convert, masks"),
        (("train", "nonsense"), "unknown recipe 'nonsense'; the recipes are: llama3-debug, llama3-tiny"),
        (("train", "--seed", "1", "llama3-tiny"), "the recipe comes before the options; got '--seed' first"),
        (("generate", "nowhere"), "nowhere does not exist; expected the directory of a run"),
    ],
)
def test_wrong_input_prints_one_message_and_exits_with_2(argv, words, capsys) -> None:
    code, out, err = call(capsys, *argv)
    assert code == 2
    assert f"error: {words}" in err
    assert "Traceback" not in err and out == ""


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--training.micro-batch-size", "0", "training.micro-batch-size must be greater than 0, got 0"),
        ("--training.sequence-length", "1", "must be at least 2"),
        ("--model.num-kv-heads", "3", "not divisible by"),
        ("--training.stepz", "3", "--training.steps"),
        ("--data.packing", "dense", "best_fit"),
        ("--data.epochs", "0", "data.epochs must be greater than 0, got 0"),
        ("--attention.backend", "magic", "reference"),
    ],
)
def test_error_of_a_wrong_option_names_the_remedy(option, value, words, capsys) -> None:
    code, _, err = call(capsys, "train", "llama3-tiny", option, value)
    assert code == 2
    assert words in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in err


@pytest.mark.parametrize("steps", [["--training.steps", "300"], ["--training.steps=300"]])
def test_the_length_of_a_run_is_given_once(steps: list[str], capsys) -> None:
    code, _, err = call(capsys, "train", "llama3-tiny", "--data.epochs", "2", *steps)
    assert code == 2
    assert "--data.epochs 2 and --training.steps 300 both set the length of a run; use one of them" in err
    assert parse(["llama3-tiny", "--data.epochs", "2"]).data.epochs == 2
    assert parse(["llama3-tiny", *steps, "--data.epochs", "None"]).training.steps == 300


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (Stopped(signal.SIGTERM, 7, Path("c/step-7")), 143, "stopped by SIGTERM after step 7; saved in c/step-7"),
        (Stopped(signal.SIGINT, 7, Path("c/step-7")), 130, "The same command continues"),
        (NonFiniteLoss(9, float("nan"), 1.0, None), 1, "error: step 9: loss nan"),
        (SaveFailed(9, "no room", Path("c/step-7")), 1, "c/step-7 is intact"),
        (ValueError("got 1; expected 2"), 2, "error: got 1; expected 2"),
        (KeyboardInterrupt(), 130, "interrupted; existing checkpoints are unchanged"),
    ],
)
def test_each_error_has_its_exit_code(error, code, words, capsys, monkeypatch) -> None:
    def fail(argv):
        raise error

    monkeypatch.setattr("sightline.cli.train.main", fail)
    actual, _, err = call(capsys, "train")
    assert actual == code
    assert words in err


def test_internal_error_keeps_its_traceback(monkeypatch) -> None:
    def fail(argv):
        raise AssertionError("internal")

    monkeypatch.setattr("sightline.cli.train.main", fail)
    with pytest.raises(AssertionError, match="internal"):
        cli.main(["train"])
