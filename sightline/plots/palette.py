"""Colors of every picture, and the style of axes. It loads no matplotlib, so that the HTML page does not either."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT = "#1b2130"
EDGE = "#8a94a6"  # of axes, and frames around documents
GRID = "#e2e6ee"
PALE_BLUE, BLUE = "#d3dcf5", "#2f5bd3"  # least to most of a quantity; none of it is white, so a little stands out
TRAIN, VALIDATION, RATE = "#2b6cb0", "#c05621", "#718096"

THOUSANDS = "{x:,.0f}"
"""Format of ticks that are whole numbers."""


def tick_step(least: float) -> int:
    """Distance of ticks: the smallest power of two that is at least `least` tokens."""
    step = 1
    while step < least:
        step *= 2
    return step


def finish(axes: Axes, title: str, fontsize: float = 10, pad: float | None = None) -> None:
    """Set a bold title at the left and style labels, ticks and edges; pad: points between axes and title."""
    axes.set_title(title, loc="left", pad=pad, fontsize=fontsize, fontweight="bold", color=TEXT)
    axes.xaxis.label.set(size=9, color=TEXT)
    axes.yaxis.label.set(size=9, color=TEXT)
    axes.tick_params(labelsize=8, colors=TEXT, length=3, width=0.6)
    axes.spines[:].set(color=EDGE, linewidth=0.6)
