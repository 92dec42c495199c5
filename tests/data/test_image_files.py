import numpy as np
import pytest
from PIL import Image

from sightline.data.image_files import fit_grid, read_image

SIZES = {"patch_size": 4, "merge": 2, "most_patches": 64}  # a token is 8 x 8 pixels, an image at most 16 tokens


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_an_image_that_fits_keeps_every_pixel(tmp_path) -> None:
    image = noise(16, 40)
    Image.fromarray(image).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", **SIZES)
    assert read.dtype == np.uint8 and np.array_equal(read, image)


@pytest.mark.parametrize(
    ("pixels", "tokens"),
    [((17, 31), (2, 4)), ((3, 2), (1, 1)), ((160, 40), (8, 2)), ((40, 160), (2, 8)), ((500, 500), (4, 4)),
     ((2000, 3), (16, 1))],
)  # fmt: skip
def test_an_image_is_scaled_to_whole_tokens(pixels: tuple[int, int], tokens: tuple[int, int], tmp_path) -> None:
    Image.fromarray(noise(*pixels)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", **SIZES).shape == (8 * tokens[0], 8 * tokens[1], 3)


@pytest.mark.parametrize("most", [1, 2, 7, 16])
def test_a_grid_never_holds_more_than_the_most(most: int) -> None:
    for height in (0.01, 0.6, 1.0, 2.5, 9.0, 400.0):
        for width in (0.01, 0.4, 1.5, 3.0, 77.0):
            rows, columns = fit_grid(height, width, most=most)
            assert rows >= 1 and columns >= 1 and rows * columns <= most
    assert fit_grid(2.2, 3.9, most=16) == (2, 4) and fit_grid(20.0, 5.0, most=16) == (8, 2)


def test_grey_and_transparent_images_become_colours_on_white(tmp_path) -> None:
    Image.fromarray(np.full((8, 8), 70, dtype=np.uint8)).save(tmp_path / "grey.png")
    assert (read_image(tmp_path / "grey.png", **SIZES) == 70).all()
    clear = np.zeros((8, 8, 4), dtype=np.uint8)
    clear[:4] = (10, 20, 30, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    read = read_image(tmp_path / "clear.png", **SIZES)
    assert (read[:4] == (10, 20, 30)).all() and (read[4:] == 255).all()


def test_a_photo_is_turned_the_way_its_camera_noted(tmp_path) -> None:
    image, exif = noise(16, 8), Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to see it upright"
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png", **SIZES), np.rot90(image, -1))


def test_what_is_no_image_is_refused(tmp_path) -> None:
    (tmp_path / "text.png").write_text("not an image")
    for name in ("text.png", "missing.png"):
        with pytest.raises(ValueError, match=rf"cannot read an image from .*{name}: .*; expected a PNG"):
            read_image(tmp_path / name, **SIZES)
