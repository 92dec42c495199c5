"""Names of files and directories with characters that a shell, a plot, a terminal or an encoding treats specially."""

import io
import json
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from sightline.cli import main
from sightline.paths import printable
from sightline.plots.loss_png import plot_loss
from sightline.training.terminal import Terminal
from sightline.training.trainer import train
from tests.support.small_runs import small_run, train_quietly, write_corpus

NAMES = ['${X}_${Y} it\'s "q"', "[red]a[bold]\n:smile:", "caf\udce9 \x1b[31m 日本"]
ROW = {"step": 1, "loss": 2.0, "learning_rate": 0.1}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_and_every_command_take_any_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    corpus, directory = write_corpus(tmp_path / f"data {name}"), tmp_path / f"run {name}"
    options = {"training__steps": 1, "validation__every": 0, "checkpoint__export": True, "logging__tensorboard": True}
    train_quietly(small_run(directory, corpus, **options))
    assert (directory / "loss.png").stat().st_size and (directory / "masks.png").stat().st_size
    assert json.loads((directory / "config.json").read_text())["data"]["source"] == str(corpus)
    plots = ["--png", str(tmp_path / f"{name}.png"), "--html", str(tmp_path / f"{name}.html")]
    assert main.run(["masks", str(directory), "--sequence-length", "16", *plots]) == 0
    assert (tmp_path / f"{name}.png").exists() and (tmp_path / f"{name}.html").exists()
    assert main.run(["generate", str(directory), "--max-new-tokens", "1", "--device", "cpu"]) == 0
    assert main.run(["convert", str(directory), str(tmp_path / f"out {name}")]) == 0
    train_quietly(small_run(directory, corpus, **{**options, "training__steps": 2}))
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 2


def test_safetensors_in_a_directory_that_is_not_utf8_are_refused_with_the_reason(tmp_path: Path, capsys) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    train_quietly(small_run(tmp_path / "run", corpus, training__steps=1))
    assert main.run(["convert", str(tmp_path / "run"), str(tmp_path / "\udce9")]) == 0
    assert main.run(["generate", str(tmp_path / "\udce9"), "--device", "cpu"]) == 0


def test_the_printed_command_is_quoted_for_the_shell(tmp_path: Path) -> None:
    directory, prompt = tmp_path / "a $HOME b", 'say "hi" it\'s $5'
    output = train_quietly(
        small_run(directory, write_corpus(tmp_path / "c"), training__steps=1, logging__sample_prompt=prompt)
    )
    command = next(line for line in output.splitlines() if line.startswith("more text")).removeprefix("more text")
    assert shlex.split(command) == ["sightline", "generate", str(directory), "--prompt", prompt]


def test_the_terminal_shows_markup_and_control_characters_as_they_are() -> None:
    for force in (False, True):
        file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
        terminal = Terminal(Console(file=file, width=200, force_terminal=force, color_system=None))
        terminal.log("[red]a[/red] :smile: \x1b[2J \udce9")
        terminal.table({"[b]": "[/nothing] \\"})
        terminal.sample("[i]", "[/i] text")
        file.flush()
        written = file.buffer.getvalue().decode()  # type: ignore[attr-defined]
        for text in ("[red]a[/red] :smile: \\x1b[2J \\udce9", "[/nothing] \\", "[i][/i] text"):
            assert text in written


def test_printable_keeps_text_and_escapes_what_cannot_be_shown() -> None:
    assert printable("日本 é\n\t[x]$") == "日本 é\n\t[x]$"
    assert printable("a\x00\x1b\r\x9b\udce9") == "a\\x00\\x1b\\r\\x9b\\udce9"


@pytest.mark.parametrize("title", ["${X}_${Y}", "$a$b$", "caf\udce9", "a\x1bb", r"\frac{"])
def test_titles_are_not_formulas(title: str, tmp_path: Path) -> None:
    plot_loss([ROW], tmp_path / "loss.png", title)
    assert (tmp_path / "loss.png").stat().st_size


def test_a_prompt_that_is_not_utf8_is_refused_before_anything_is_read(tmp_path: Path, capsys) -> None:
    assert main.run(["generate", str(tmp_path), "--prompt", "caf\udce9"]) == 2
    assert "--prompt 'caf\\udce9' contains bytes that are not UTF-8" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"logging\.sample-prompt .* not UTF-8"):
        train(small_run(tmp_path / "run", tmp_path, logging__sample_prompt="\udce9"))


def test_an_error_of_the_system_is_one_line(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "[red]"))

    monkeypatch.setattr("sightline.load", load, raising=False)
    assert main.run(["generate", str(tmp_path)]) == 1
    assert "Permission denied" in (error := capsys.readouterr().err) and "[red]" in error and "Traceback" not in error
