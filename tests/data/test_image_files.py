import numpy as np
import pytest
from PIL import Image

from sightline.data.image_files import fit_grid, read_image

SIZES = {"patch_size": 4, "merge": 2, "most_patches": 64}  # a token is 8 x 8 pixels; an image has at most 16 tokens


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_image_of_valid_size_is_unchanged(tmp_path) -> None:
    image = noise(16, 40)
    Image.fromarray(image).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", **SIZES)
    assert read.dtype == np.uint8 and np.array_equal(read, image)


@pytest.mark.parametrize(
    ("pixels", "tokens"),
    [((17, 31), (2, 4)), ((3, 2), (1, 1)), ((160, 40), (8, 2)), ((40, 160), (2, 8)), ((500, 500), (4, 4)),
     ((2000, 3), (16, 1))],
)  # fmt: skip
def test_image_is_resized_to_whole_tokens(pixels: tuple[int, int], tokens: tuple[int, int], tmp_path) -> None:
    Image.fromarray(noise(*pixels)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", **SIZES).shape == (8 * tokens[0], 8 * tokens[1], 3)


@pytest.mark.parametrize("max_cells", [1, 2, 7, 16])
def test_grid_has_at_most_max_cells(max_cells: int) -> None:
    for height in (0.01, 0.6, 1.0, 2.5, 9.0, 400.0):
        for width in (0.01, 0.4, 1.5, 3.0, 77.0):
            rows, columns = fit_grid(height, width, max_cells=max_cells)
            assert rows >= 1 and columns >= 1 and rows * columns <= max_cells
    assert fit_grid(2.2, 3.9, max_cells=16) == (2, 4) and fit_grid(20.0, 5.0, max_cells=16) == (8, 2)


def test_gray_and_transparent_images_become_rgb_on_white(tmp_path) -> None:
    Image.fromarray(np.full((8, 8), 70, dtype=np.uint8)).save(tmp_path / "gray.png")
    assert (read_image(tmp_path / "gray.png", **SIZES) == 70).all()
    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    clear[:4] = (10, 20, 30, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    read = read_image(tmp_path / "clear.png", **SIZES)
    assert (read[:4] == (10, 20, 30)).all() and (read[4:] == 255).all()


def test_exif_orientation_is_applied(tmp_path) -> None:
    image, exif = noise(16, 8), Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    Image.fromarray(image).save(tmp_path / "rotated.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "rotated.png", **SIZES), np.rot90(image, -1))


def test_files_that_are_not_images_raise(tmp_path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    for name in ("text.png", "missing.png"):
        with pytest.raises(ValueError, match=rf"cannot read an image from .*{name}: .*; expected a PNG"):
            read_image(tmp_path / name, **SIZES)
