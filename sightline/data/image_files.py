"""Read image files at sizes that a vision-language model accepts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps  # matplotlib needs it anyway


def read_image(path: Path, *, patch_size: int, merge: int, most_patches: int) -> np.ndarray:
    """Read an image as uint8 [height, width, 3], resized so that both sides are a whole number of image tokens.

    An image token is a square of `merge` x `merge` patches. The size is the nearest one with at most `most_patches`
    patches; images of such a size are not resampled. Transparent pixels are blended with white.

    Raises:
        ValueError: if the file does not exist or is not an image.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file).convert("RGBA")  # apply the rotation in the EXIF data
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"cannot read an image from {path}: {error}; expected a PNG, JPEG, WebP or similar file"
        ) from None
    background = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(background, image).convert("RGB")
    step = patch_size * merge
    width, height = image.size
    rows, columns = fit_grid(height / step, width / step, max_cells=most_patches // merge**2)
    if (width, height) != (columns * step, rows * step):
        image = image.resize((columns * step, rows * step), Image.Resampling.BILINEAR)
    return np.asarray(image)


def fit_grid(height: float, width: float, *, max_cells: int) -> tuple[int, int]:
    """Round (height, width) to integers of at least 1, scaled down so that their product is at most `max_cells`.

    (2.2, 3.9) -> (2, 4);  (20.0, 5.0) with max_cells=16 -> (8, 2), which keeps the aspect ratio
    """
    scale = min(1.0, math.sqrt(max_cells / (height * width)))
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    while rows * columns > max_cells:  # because of rounding: shorten the longer side
        rows, columns = (rows - 1, columns) if rows >= columns else (rows, columns - 1)
    return rows, columns
