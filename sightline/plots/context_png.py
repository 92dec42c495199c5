"""Plot of a context-parallel plan: the owner of each token, the keys sent between ranks, and the work of each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sightline.plots.palette import BLUE, PALE_BLUE, TEXT, THOUSANDS, finish, save

KEYS = LinearSegmentedColormap.from_list("keys", [PALE_BLUE, BLUE, TEXT])
COLUMNS = 1600  # samples per row, more than it has pixels
MAX_LABELED_RANKS = 8  # up to this many ranks, each cell is labeled with its number of keys


Plan = Any
"""A `sightline.parallel.context.plan.ContextPlan`; not imported, since `plots` is a lower layer than `parallel`."""


def plot_context_plan(plan: Plan, path: Path) -> None:
    """Plot the rows, colored by the rank that owns each token; below, the keys sent between ranks and their work."""
    rows, degree = plan.shape[0], plan.degree
    colors = colormaps["tab10" if degree <= 10 else "turbo"].resampled(10 if degree <= 10 else degree)
    height = 0.9 + 0.3 * rows
    figure = Figure(figsize=(11, height + 5), dpi=150, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[height, 5], width_ratios=[1, 1.1])
    _plot_owners(figure.add_subplot(grid[0, :]), plan, colors)
    _plot_sent(figure.add_subplot(grid[1, 0]), plan)
    _plot_work(figure.add_subplot(grid[1, 1]), plan, colors)
    save(figure, path)


def _plot_owners(axes: Axes, plan: Plan, colors: Colormap) -> None:
    """Plot the owner of each token. Rows longer than `COLUMNS` are sampled, so very short pieces may be missing."""
    rows, length = plan.shape
    pieces = plan.pieces
    owner = np.repeat(pieces.rank, pieces.last - pieces.first).reshape(rows, length)
    columns = min(length, COLUMNS)
    sampled = owner[:, (np.arange(columns) * 2 + 1) * length // (2 * columns)]
    extent = (0.0, float(length), rows - 0.5, -0.5)
    axes.imshow(
        sampled, cmap=colors, vmin=-0.5, vmax=colors.N - 0.5, extent=extent, aspect="auto", interpolation="nearest"
    )
    axes.set(xlabel="token", ylabel="row", yticks=range(rows))
    axes.xaxis.set_major_formatter(THOUSANDS)
    finish(axes, f"Owners: {plan.degree} ranks, {len(pieces.rank) / (rows * plan.degree):.1f} pieces per row and rank")


def _plot_sent(axes: Axes, plan: Plan) -> None:
    sent = plan.sent_keys().numpy()
    rows, length = plan.shape
    all_gather = (plan.degree - 1) * length * rows * len(plan.masks)
    image = axes.imshow(np.ma.masked_equal(sent, 0), cmap=KEYS, vmin=0)
    if plan.degree <= MAX_LABELED_RANKS:
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
    share = f", {sent.sum() / all_gather:.1%} of all-gather" if all_gather else ""
    finish(axes, f"Keys sent, one layer per mask{share}")


def _plot_work(axes: Axes, plan: Plan, colors: Colormap) -> None:
    work = plan.work().numpy()
    mean = work.mean()
    axes.bar(range(plan.degree), work, color=colors(np.arange(plan.degree)), width=0.85)
    axes.axhline(mean, color=TEXT, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set(xlabel="rank", ylabel="visible pairs")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(THOUSANDS)
    finish(axes, f"Work: max / mean {work.max() / mean:.3f}" if mean else "Work: none, padding only")
