"""Colors and axis style of all plots. It does not import matplotlib, since the HTML page does not need it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sightline.paths import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT = "#1b2130"
EDGE = "#8a94a6"  # axes, and frames around segments
GRID = "#e2e6ee"
PALE_BLUE, BLUE = "#d3dcf5", "#2f5bd3"  # low to high values; the lowest differs from white
TRAIN, VALIDATION, RATE = "#2b6cb0", "#c05621", "#718096"

THOUSANDS = "{x:,.0f}"
"""Tick format of integers."""


def tick_step(least: float) -> int:
    """Return the distance between ticks: the smallest power of two >= `least` tokens."""
    step = 1
    while step < least:
        step *= 2
    return step


def save(figure: Figure, path: Path, **options: Any) -> None:
    """Write a figure. Characters that the font lacks, as of a Chinese name, become boxes without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(path, **options)


def finish(axes: Axes, title: str, fontsize: float = 10, pad: float | None = None) -> None:
    """Set a bold left-aligned title, and style labels, ticks and spines; pad: points between axes and title."""
    axes.set_title(
        printable(title), loc="left", pad=pad, fontsize=fontsize, fontweight="bold", color=TEXT, parse_math=False
    )
    axes.xaxis.label.set(size=9, color=TEXT)
    axes.yaxis.label.set(size=9, color=TEXT)
    axes.tick_params(labelsize=8, colors=TEXT, length=3, width=0.6)
    axes.spines[:].set(color=EDGE, linewidth=0.6)
