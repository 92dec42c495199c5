"""Helpers for the tables and files that commands write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.table import Table
from rich.text import Text

from sightline.paths import printable


def tabulate(columns: dict[str, dict[str, str]]) -> Table:
    """Return a table with one row per label and one column per name: {column: {label: value}}."""
    table = Table.grid(padding=(0, 3))
    labels = list(dict.fromkeys(label for column in columns.values() for label in column))
    table.add_row("", *(Text(printable(name), "bold") for name in columns))
    for label in labels:
        table.add_row(Text(label, "dim"), *(Text(column.get(label, "")) for column in columns.values()))
    table.add_row()
    return table


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Create the directory of a file, run the block that writes the file, and print its path.

    Raises:
        ValueError: if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}; choose another path") from error
    print(f"wrote {path}")
