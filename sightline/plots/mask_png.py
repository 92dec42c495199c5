"""masks.png: the attention masks of a row."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MultipleLocator

from sightline.masks import AttentionMask
from sightline.masks.statistics import check_row, get_statistics, occupancy, segment_boundaries
from sightline.plots.palette import BLUE, EDGE, GRID, PALE_BLUE, TEXT, THOUSANDS, finish, save, tick_step

PANEL = 5.2  # inches per side
MAX_CELLS = 700  # per side of a panel, about one per pixel
MAX_GRID_LINES = 128
MAX_TICKS = 8
MAX_FRAMES = 100  # more segments are not framed, since the frames would hide the mask
SHADES = LinearSegmentedColormap.from_list("visible", [PALE_BLUE, BLUE])


def plot_masks(masks: Mapping[str, AttentionMask], path: Path, row: int = 0) -> None:
    """Plot one panel per named mask: the visible fraction of each cell of queries x keys in row `row`.

    For up to 700 tokens a cell is one pair. Longer rows are averaged over cells of several tokens, so that no visible
    pair is lost. Dashed frames mark segments that do not attend to each other, such as documents.
    """
    columns = min(3, len(masks))
    lines = -(-len(masks) // columns)
    figure = Figure(figsize=(PANEL * columns + 0.4, (PANEL + 0.5) * lines), dpi=150, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (name, mask) in zip(panels, masks.items(), strict=False):
        check_row(mask, row)
        _plot_mask(axes, name, mask[row])
    for axes in panels[len(masks) :]:
        axes.set_axis_off()
    save(figure, path, bbox_inches="tight", pad_inches=0.15)


def _plot_mask(axes: Axes, name: str, mask: AttentionMask) -> None:
    """Plot a mask of one row. Token n is centered at coordinate n."""
    _, queries, keys = mask.shape
    tall, wide = -(-queries // MAX_CELLS), -(-keys // MAX_CELLS)
    share = occupancy(mask, 0, (tall, wide)).numpy()
    lines, columns = share.shape
    extent = (-0.5, columns * wide - 0.5, lines * tall - 0.5, -0.5)
    axes.imshow(
        np.ma.masked_equal(share, 0), cmap=SHADES, vmin=0, vmax=1, extent=extent, interpolation="nearest", aspect="auto"
    )
    axes.set(xlim=(-0.5, keys - 0.5), ylim=(queries - 0.5, -0.5), xlabel="key", ylabel="query")
    if max(queries, keys) / min(queries, keys) < 5:
        axes.set_aspect("equal")
    if max(queries, keys) <= MAX_GRID_LINES:
        axes.vlines([key - 0.5 for key in range(1, keys)], -0.5, queries - 0.5, color=GRID, linewidth=0.5)
        axes.hlines([query - 0.5 for query in range(1, queries)], -0.5, keys - 0.5, color=GRID, linewidth=0.5)
    boundaries = segment_boundaries(mask, 0)
    if 0 < len(boundaries) < MAX_FRAMES:
        for first, end in pairwise([0, *boundaries, keys]):
            corner, size = (first - 0.5, first - 0.5), end - first
            axes.add_patch(
                Rectangle(corner, size, size, fill=False, edgecolor=EDGE, linewidth=0.8, linestyle=(0, (4, 3)))
            )
    for axis, length in ((axes.xaxis, keys), (axes.yaxis, queries)):
        axis.set_major_locator(MultipleLocator(tick_step(length / MAX_TICKS)))
        axis.set_major_formatter(THOUSANDS)
    count = f", {len(boundaries) + 1:,} segments" if boundaries else ""
    lines_of_text = textwrap.wrap(get_statistics(mask).describe() + count, 76)
    axes.text(0, 1.015, "\n".join(lines_of_text), transform=axes.transAxes, fontsize=8, color=TEXT, va="bottom")
    finish(axes, name, fontsize=11, pad=9 + 10 * len(lines_of_text))  # above the lines of text
