"""masks.png: the plotted area of a mask."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from sightline.masks import causal, document, sliding_window
from sightline.plots.mask_png import plot_masks
from tests.support.random_masks import packed

INK = np.array([0x2F, 0x5B, 0xD3]) / 255


def ink_share(path: Path) -> float:
    """Fraction of the pixels that have the color of a visible pair."""
    pixels = imread(path)[..., :3]
    return float((np.abs(pixels - INK).max(axis=2) < 0.02).mean())


def test_one_panel_per_mask(tmp_path: Path) -> None:
    one, four = tmp_path / "one.png", tmp_path / "four.png"
    plot_masks({"attention": causal(1, 64)}, one)
    plot_masks({name: causal(1, 64) for name in "abcd"}, four)
    (height, width, _), (tall, wide, _) = imread(one).shape, imread(four).shape
    assert wide > 2.5 * width and tall > 1.8 * height  # three panels in the first row, one in the second


@pytest.mark.parametrize("length", [600, 65_536])
def test_plotted_area_is_the_share_of_visible_pairs(tmp_path: Path, length: int) -> None:
    """Compare a full mask with a causal one (a half) and with two causal documents (a quarter)."""
    shares = []
    full = document(torch.zeros(1, length, dtype=torch.int32))
    for mask in (full, causal(1, length), packed(length // 2, length // 2)):
        plot_masks({"attention": mask}, tmp_path / "masks.png")
        shares.append(ink_share(tmp_path / "masks.png"))
    assert shares[0] > 0.6
    assert shares[1] / shares[0] == pytest.approx(0.5, abs=0.02)
    assert shares[2] / shares[0] == pytest.approx(0.25, abs=0.02)


def test_masks_of_any_shape(tmp_path: Path) -> None:
    ids = torch.tensor([[0, 1]], dtype=torch.int32)
    masks = {
        "one token": causal(1, 1),
        "cross": document(ids, ids.repeat_interleave(500, dim=1)),
        "padding only": document(torch.full((1, 8), -1)),
        "1,200 documents of one token": packed(*[1] * 1200),
    }
    plot_masks(masks, tmp_path / "masks.png")
    assert (tmp_path / "masks.png").stat().st_size > 10_000


def test_requested_row(tmp_path: Path) -> None:
    ids = torch.tensor([[0] * 8, [-1] * 8])  # row 1 is padding
    for row in (0, 1):
        plot_masks({"attention": document(ids)}, tmp_path / f"{row}.png", row=row)
    assert ink_share(tmp_path / "0.png") > 0.5 > 0.01 > ink_share(tmp_path / "1.png")
    with pytest.raises(ValueError, match="row 2 is not in this mask of 2 rows"):
        plot_masks({"attention": sliding_window(2, 8, 2)}, tmp_path / "2.png", row=2)
