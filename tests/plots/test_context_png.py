"""Plot of a context-parallel plan."""

from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from sightline.masks import causal, document, sliding_window
from sightline.parallel import plan_context
from sightline.plots.context_png import plot_context_plan
from tests.support.random_masks import documents


@pytest.mark.parametrize("degree", [1, 16])
def test_plot_context_plan(degree: int, tmp_path: Path) -> None:
    ids = torch.cat([documents(40, 100, 20), torch.full((1, 160), -1, dtype=torch.int32)])
    masks = {"full": causal(2, 160) & document(ids), "window": sliding_window(2, 160, 9) & document(ids)}
    plot_context_plan(plan_context(masks, degree), tmp_path / "plan.png")
    image = imread(tmp_path / "plan.png")
    assert image.shape[0] > 500 and image.shape[1] == 1650 and image.std() > 0.05
    plot_context_plan(plan_context(document(torch.full((1, 32), -1)), degree), tmp_path / "padding.png")
