"""Terminal output of a run: a progress bar on a terminal, plain lines otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from sightline.numbers import duration
from sightline.paths import printable

EVERY = 10  # steps between lines if the output is not a terminal


def shown(text: str, style: str = "") -> Text:
    """Return text of users for a console, which must not interpret `[red]` or `:smile:` in it as markup."""
    return Text(printable(text), style)


class Terminal:
    """Writes the log lines and the progress bar of a run."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._steps = 0
        self._recent = 0.0  # moving average of the seconds per step

    def log(self, text: str, style: str | None = None) -> None:
        """Write one line, without wrapping if the output is not a terminal."""
        self.console.print(shown(text), style=style, soft_wrap=not self.console.is_terminal)

    def warn(self, text: str) -> None:
        self.log(f"warning: {text}", style="yellow")

    @contextmanager
    def progress(self, step: int, steps: int) -> Iterator[None]:
        """Show a progress bar inside the `with` block, if the output is a terminal."""
        self._steps = steps
        if not self.console.is_terminal:
            yield
            return
        self._progress = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            speed_estimate_period=60,
            transient=True,
        )
        self._task = self._progress.add_task("train", total=steps, completed=step, numbers="")
        with self._progress:
            yield
        self._progress = None

    def step(self, row: Mapping[str, Any]) -> None:
        """Show the metrics of one step."""
        step, validation = row["step"], row.get("validation_loss")
        self._recent = row["seconds"] if self._recent == 0.0 else 0.9 * self._recent + 0.1 * row["seconds"]
        speed = f"{row['tokens_per_second']:,.0f} tokens/s  MFU {row['mfu']:.1%}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=f"loss {row['loss']:.3f}  {speed}")
            if validation is not None:
                self.log(f"step {step}  loss {row['loss']:.4f}  validation {validation:.4f}")
        elif step % EVERY == 0 or step in (1, self._steps) or validation is not None:
            held_out = "" if validation is None else f"  validation {validation:.4f}"
            left = f"  {duration((self._steps - step) * self._recent)} left" if step < self._steps else ""
            self.log(f"step {step}/{self._steps}  loss {row['loss']:.4f}{held_out}  {speed}{left}")

    def sample(self, prompt: str, text: str) -> None:
        """Show a text sample of the model, with the prompt in bold on a terminal."""
        self.log("")
        if self.console.is_terminal:
            sample = Text.assemble(shown(prompt, "bold"), shown(text))
            self.console.print(Panel(sample, title="a sample", title_align="left", border_style="dim"))
        else:
            self.log(f"a sample:\n{prompt}{text}\n")

    def table(self, rows: Mapping[str, str]) -> None:
        """Write a table of two columns: names and values."""
        table = Table.grid(padding=(0, 1))
        table.add_column(min_width=12)
        table.add_column()
        for name, value in rows.items():
            if self.console.is_terminal:
                table.add_row(shown(name, "dim"), shown(value))
            else:
                self.log(f"{name:<12} {value}")
        if self.console.is_terminal:
            self.console.print(table)
