"""Output of a run on a terminal and without one."""

import io

import pytest
from rich.console import Console

from sightline.training.terminal import Terminal

ROW = {"loss": 2.34567, "tokens_per_second": 1534.2, "mfu": 0.4321, "seconds": 2.0}


def quiet() -> tuple[Terminal, io.StringIO]:
    output = io.StringIO()
    return Terminal(Console(file=output, highlight=False)), output


def test_plain_lines_every_ten_steps_and_at_each_validation() -> None:
    terminal, output = quiet()
    with terminal.progress(0, 25):
        for step in range(1, 26):
            terminal.step({"step": step, **ROW, **({"validation_loss": 2.5} if step == 7 else {})})
    lines = output.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "7/25", "10/25", "20/25", "25/25"]
    assert lines[1] == "step 7/25  loss 2.3457  validation 2.5000  1,534 tokens/s  MFU 43.2%  0:36 left"
    assert lines[-1] == "step 25/25  loss 2.3457  1,534 tokens/s  MFU 43.2%"


def test_no_control_characters_without_a_terminal() -> None:
    terminal, output = quiet()
    with terminal.progress(0, 2):
        terminal.step({"step": 1, **ROW})
    terminal.warn("[bold] is text here")
    terminal.table({"run": "runs/x", "data": "a long line " * 20})
    terminal.sample("def ", "f(x):\n    return [x]")
    text = output.getvalue()
    assert "\x1b" not in text and "\r" not in text
    assert "warning: [bold] is text here\n" in text
    assert "a long line " * 19 in text, "a long line is not broken"
    assert "a sample:\ndef f(x):\n    return [x]\n" in text


def test_a_progress_bar_on_a_terminal() -> None:
    output = io.StringIO()
    terminal = Terminal(Console(file=output, force_terminal=True, width=100, highlight=False))
    with terminal.progress(3, 10):
        terminal.step({"step": 4, **ROW})
        terminal.step({"step": 5, **ROW, "validation_loss": 2.5})
    terminal.sample("def ", "f(x)")
    text = output.getvalue()
    assert "step 5/10" in text and "loss 2.346  1,534 tokens/s  MFU 43.2%" in text and "left" in text
    assert "step 5  loss 2.3457  validation 2.5000" in text
    assert "a sample" in text


def test_the_progress_bar_is_removed_when_the_run_fails() -> None:
    terminal = Terminal(Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(RuntimeError), terminal.progress(0, 10):
        raise RuntimeError
    with terminal.progress(0, 10):  # rich raises an error if two are active
        pass
