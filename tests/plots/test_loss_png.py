"""loss.png, and the smoothing of its training loss."""

import matplotlib.image
import pytest

from sightline.plots.loss_png import plot_loss, smooth


def test_smooth() -> None:
    assert smooth([4.0]).tolist() == [4.0]
    assert smooth([1.0, 5.0]).tolist() == [1.0, 5.0]
    assert smooth([0.0, 4.0, 8.0]).tolist() == pytest.approx([4 / 3, 4.0, 20 / 3])
    assert smooth([3.0] * 1000).tolist() == pytest.approx([3.0] * 1000)
    assert len(smooth([1.0] * 100_000)) == 100_000


@pytest.mark.parametrize("steps", [1, 2, 60])
def test_plot_for_any_number_of_steps(steps, tmp_path) -> None:
    rows = [{"step": step, "loss": 9 / step, "learning_rate": 1e-3} for step in range(1, steps + 1)]
    rows[-1]["validation_loss"] = 3.0
    plot_loss(rows, tmp_path / "loss.png", "a run")
    height, width, _ = matplotlib.image.imread(tmp_path / "loss.png").shape
    assert width > 1000 and height > 600
