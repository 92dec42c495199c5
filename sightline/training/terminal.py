"""What a run says: a progress line on a terminal, plain lines everywhere else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from sightline.numbers import duration

EVERY = 10  # steps between lines where output is no terminal


class Terminal:
    """Lines before, during and after the steps."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._steps = 0
        self._recent = 0.0  # seconds of a step, lately

    def log(self, text: str, style: str | None = None) -> None:
        """One line; a long one is not broken where output is no terminal."""
        self.console.print(escape(text), style=style, soft_wrap=not self.console.is_terminal)

    def warn(self, text: str) -> None:
        self.log(f"warning: {text}", style="yellow")

    @contextmanager
    def progress(self, step: int, steps: int) -> Iterator[None]:
        """The progress line, where output is a terminal, while the block runs."""
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
        """One row of metrics."""
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
        """Text the model wrote, the prompt marked where there is colour."""
        self.log("")
        if self.console.is_terminal:
            shown = f"[bold]{escape(prompt)}[/bold]{escape(text)}"
            self.console.print(Panel(shown, title="a sample", title_align="left", border_style="dim"))
        else:
            self.log(f"a sample:\n{prompt}{text}\n")

    def table(self, rows: Mapping[str, str]) -> None:
        """Two columns without lines: what, and where."""
        table = Table.grid(padding=(0, 1))
        table.add_column(min_width=12)
        table.add_column()
        for what, where in rows.items():
            if self.console.is_terminal:
                table.add_row(f"[dim]{escape(what)}[/dim]", escape(where))
            else:
                self.log(f"{what:<12} {where}")
        if self.console.is_terminal:
            self.console.print(table)
