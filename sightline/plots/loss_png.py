"""loss.png: training and validation loss, with the learning rate below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sightline.paths import printable
from sightline.plots.palette import GRID, RATE, TRAIN, VALIDATION, save


def plot_loss(rows: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Plot the rows of a metrics.jsonl (`step`, `loss`, `learning_rate`, in some rows `validation_loss`)."""
    steps = [row["step"] for row in rows]
    losses = [row["loss"] for row in rows]
    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
    above.plot(steps, losses, color=TRAIN, linewidth=0.7, alpha=0.35)
    above.plot(steps, smooth(losses), color=TRAIN, linewidth=1.8, label="training (smoothed; thin line: every step)")
    validated = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    if validated:
        above.plot(*zip(*validated, strict=True), color=VALIDATION, marker="o", markersize=4.5, label="validation")
        step, loss = validated[-1]
        above.annotate(
            f"{loss:.2f}", (step, loss), xytext=(0, 7), textcoords="offset points", color=VALIDATION, ha="center"
        )
    above.set_ylabel("loss per token (nats)")
    above.set_title(printable(title), loc="left", fontsize=11, parse_math=False)  # a name may have a $
    above.legend(frameon=False)
    below.plot(steps, [row["learning_rate"] for row in rows], color=RATE, linewidth=1.2)
    below.set_ylabel("learning\nrate", color=RATE, fontsize=8)
    below.tick_params(axis="y", labelsize=7, colors=RATE)
    below.set_ylim(bottom=0)
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.margins(x=0.02)
    save(figure, path)


def smooth(values: Sequence[float]) -> np.ndarray:
    """Centered moving average with triangular weights over about a twentieth of the values, fewer at the ends.

    smooth([0, 4, 8]) is [1.33, 4, 6.67]: weights 1 2 1, and 2 1 at the ends.
    """
    half_width = min(250, max(1, len(values) // 40), (len(values) - 1) // 2)
    weights = np.bartlett(2 * half_width + 3)[1:-1]
    return np.convolve(values, weights, "same") / np.convolve(np.ones(len(values)), weights, "same")
