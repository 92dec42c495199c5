"""A picture of a context-parallel plan: who owns which tokens, who sends keys to whom, and who works how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sightline.plots.palette import BLUE, PALE_BLUE, TEXT, THOUSANDS, finish

KEYS = LinearSegmentedColormap.from_list("keys", [PALE_BLUE, BLUE, TEXT])
COLUMNS = 1600  # of the drawing of a row, more than it has pixels
MOST_NUMBERS = 8  # ranks up to which the number of keys stands in each cell


Plan = Any
"""A `sightline.parallel.context.plan.ContextPlan`, whose package lies above this one."""


def plot_context_plan(plan: Plan, path: Path) -> None:
    """Rows above, colored by the rank that owns each token; below, keys from rank to rank, and the work of each."""
    rows, degree = plan.shape[0], plan.degree
    colors = colormaps["tab10" if degree <= 10 else "turbo"].resampled(10 if degree <= 10 else degree)
    height = 0.9 + 0.3 * rows
    figure = Figure(figsize=(11, height + 5), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[height, 5], width_ratios=[1, 1.1])
    _plot_owners(figure.add_subplot(grid[0, :]), plan, colors)
    _plot_sent(figure.add_subplot(grid[1, 0]), plan)
    _plot_work(figure.add_subplot(grid[1, 1]), plan, colors)
    figure.savefig(path)


def _plot_owners(axes: Axes, plan: Plan, colors: Colormap) -> None:
    """A row of longer than `COLUMNS` is sampled: pieces that are narrower than a pixel may not be seen."""
    rows, length = plan.shape
    pieces = plan.pieces
    owner = np.repeat(pieces.rank, pieces.last - pieces.first).reshape(rows, length)
    columns = min(length, COLUMNS)
    seen = owner[:, (np.arange(columns) * 2 + 1) * length // (2 * columns)]
    extent = (0.0, float(length), rows - 0.5, -0.5)
    axes.imshow(
        seen, cmap=colors, vmin=-0.5, vmax=colors.N - 0.5, extent=extent, aspect="auto", interpolation="nearest"
    )
    axes.set(xlabel="token", ylabel="row", yticks=range(rows))
    axes.xaxis.set_major_formatter(THOUSANDS)
    finish(axes, f"Owners: {plan.degree} ranks, {len(pieces.rank) / (rows * plan.degree):.1f} pieces of a row each")


def _plot_sent(axes: Axes, plan: Plan) -> None:
    sent = plan.sent_keys().numpy()
    rows, length = plan.shape
    everything = (plan.degree - 1) * length * rows * len(plan.masks)
    image = axes.imshow(np.ma.masked_equal(sent, 0), cmap=KEYS, vmin=0)
    if plan.degree <= MOST_NUMBERS:
        for source, rank in zip(*sent.nonzero(), strict=True):
            dark = sent[source, rank] > 0.4 * sent.max()
            axes.text(
                rank, source, f"{sent[source, rank]:,}", ha="center", va="center", fontsize=7,
                color="white" if dark else TEXT,
            )  # fmt: skip
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, format=THOUSANDS)
    bar.ax.tick_params(labelsize=8, colors=TEXT)
    axes.set(xlabel="to rank", ylabel="from rank")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    share = f", {sent.sum() / everything:.1%} of all-gather" if everything else ""
    finish(axes, f"Keys sent in a layer of each mask{share}")


def _plot_work(axes: Axes, plan: Plan, colors: Colormap) -> None:
    work = plan.work().numpy()
    mean = work.mean()
    axes.bar(range(plan.degree), work, color=colors(np.arange(plan.degree)), width=0.85)
    axes.axhline(mean, color=TEXT, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(xlabel="rank", ylabel="visible pairs")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(THOUSANDS)
    finish(axes, f"Work: most / mean {work.max() / mean:.3f}" if mean else "Work: none, all is padding")
