"""The table of `sightline leaks`."""

from __future__ import annotations

import json
import os

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sightline.cli.leaks import Leaks
from sightline.cli.output import writing
from sightline.hf import enable, leaks
from sightline.hf.leaks import ModelReport, check_calls
from sightline.hf.loading import load_model
from sightline.paths import printable

STYLES = {"leaks": "bold red", "no leak": "green", "refused": "yellow"}


def show_leaks(options: Leaks) -> None:
    """Print the results of all calls and write the file named by the options.

    Raises:
        SystemExit: with code 1 if a call leaks.
        ValueError: if the model cannot be loaded or enabled, or a call is unknown.
    """
    check_calls(options.calls)
    model = load_model(os.path.expanduser(options.hf), options.attention)
    if options.enable:
        enable(model, check=False)  # the calls below test more
    report = leaks(model, calls=options.calls or None)
    show(Console(highlight=False), report)
    if options.json:
        with writing(options.json):
            options.json.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    if report.leaks:
        raise SystemExit(1)


def show(console: Console, report: ModelReport) -> None:
    """Print the table of a report."""
    table = Table.grid(padding=(0, 3))
    for _ in range(5):
        table.add_column(overflow="fold")
    table.add_row(*(Text(name, "bold") for name in ("call", "", "change", "gradient", "from layer, or refusal")))
    for call, verdict, *cells in report.rows():
        table.add_row(Text(call, "dim"), Text(verdict, STYLES[verdict]), *(Text(printable(cell)) for cell in cells))
    console.print(Text(printable(report.summary), "bold"), table, sep="\n\n")
