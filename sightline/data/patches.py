"""Images as rows of patches: what a batch's `extra` holds for models that see."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_patches(image: np.ndarray, patch_size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """uint8 [height, width, C] -> float32 [patches, patch_size^2 * C] from -1 to 1, and (height, width) in patches.

    Patches from left to right and from top to bottom, the numbers of one as [row, column, colour]: as SigLIP 2 wants
    them. Errors: ValueError where the image is no whole number of patches.
    """
    height, width, channels = image.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"an image of {height} x {width} pixels is no whole number of patches of {patch_size} x {patch_size}; "
            "resize it"
        )
    grid = (height // patch_size, width // patch_size)
    parts = image.reshape(grid[0], patch_size, grid[1], patch_size, channels).swapaxes(1, 2)
    return parts.reshape(grid[0] * grid[1], -1).astype(np.float32) / 127.5 - 1, grid


def pack_patches(rows: Sequence[Sequence[np.ndarray]], patch_size: int, *, channels: int = 3) -> dict[str, Tensor]:
    """The images uint8 [height, width, C] of each row of a batch -> its `extra`:

    patches     float32 [B, P, patch_size^2 * C], those of a row one image after the other; 0 behind the last
    patch_grid  int64 [B, N, 2], height and width of each image in patches; 0 where a row has fewer than N
    P is the most patches of a row, rounded up to a multiple of 64.
    """
    cut = [[to_patches(image, patch_size) for image in images] for images in rows]
    longest = max([sum(len(part) for part, _ in images) for images in cut], default=0)
    patches = torch.zeros(len(rows), max(64, longest + -longest % 64), patch_size**2 * channels)
    grids = torch.zeros(len(rows), max(1, *(len(images) for images in cut), 1), 2, dtype=torch.int64)
    for row, images in enumerate(cut):
        if images:
            whole = torch.from_numpy(np.concatenate([part for part, _ in images]))
            patches[row, : len(whole)] = whole
            grids[row, : len(images)] = torch.tensor([grid for _, grid in images])
    return {"patches": patches, "patch_grid": grids}
