"""Images from files, at sizes that a model can see."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps  # matplotlib needs it anyway


def read_image(path: Path, *, patch_size: int, merge: int, most_patches: int) -> np.ndarray:
    """The image of a file: uint8 [height, width, 3], a whole number of image tokens high and wide.

    An image token is a square of `merge` x `merge` patches. The image is scaled to the nearest size that is a whole
    number of them and holds at most `most_patches` patches; one that is such a size already keeps every pixel.
    What is transparent lies on white.

    Errors: ValueError for a file that is not there or holds no image.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGBA")  # cameras note which side is up
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read an image from {path}: {error}; expected a PNG, JPEG, WebP or the like") from None
    ground = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(ground, image).convert("RGB")
    step = patch_size * merge
    width, height = image.size
    rows, columns = fit_grid(height / step, width / step, most=most_patches // merge**2)
    if (width, height) != (columns * step, rows * step):
        image = image.resize((columns * step, rows * step), Image.Resampling.BILINEAR)
    return np.asarray(image)


def fit_grid(height: float, width: float, *, most: int) -> tuple[int, int]:
    """Whole numbers near (height, width), each at least 1, whose product is at most `most`.

    (2.2, 3.9) -> (2, 4);  (20.0, 5.0) with most=16 -> (8, 2), the same shape and smaller
    """
    shrink = min(1.0, math.sqrt(most / (height * width)))
    rows, columns = max(1, round(height * shrink)), max(1, round(width * shrink))
    while rows * columns > most:  # rounding went over it: shorten the longer side
        rows, columns = (rows - 1, columns) if rows >= columns else (rows, columns - 1)
    return rows, columns
