"""Colors and ticks shared by all plots; text and HTML do not import matplotlib."""

import subprocess
import sys

import pytest

from sightline.masks import causal
from sightline.plots.mask_page import to_html
from sightline.plots.palette import BLUE, TEXT, tick_step


@pytest.mark.parametrize(("least", "step"), [(0.1, 1), (1, 1), (1.5, 2), (2, 2), (512.5, 1024), (1024, 1024)])
def test_tick_step_is_a_power_of_two(least: float, step: int) -> None:
    assert tick_step(least) == step


def test_the_page_uses_the_colors_of_the_palette() -> None:
    page = to_html({"mask": causal(1, 2)})
    assert f"--text: {TEXT};" in page and f"--ink: {BLUE};" in page


def test_text_and_page_do_not_import_matplotlib() -> None:
    script = "import sys, sightline.plots.mask_page, sightline.plots.mask_text; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
