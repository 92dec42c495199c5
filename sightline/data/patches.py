"""Images as rows of patches: the `extra` inputs of a batch for vision-language models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def to_patches(image: np.ndarray, patch_size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """uint8 [height, width, C] -> float32 [patches, patch_size^2 * C] from -1 to 1, and (height, width) in patches.

    As in SigLIP 2, patches are ordered left to right, then top to bottom, and values as [row, column, channel].

    Raises:
        ValueError: if a side of the image is not a multiple of `patch_size`.
    """
    height, width, channels = image.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"got an image of {height} x {width} pixels; expected multiples of the patch size {patch_size}; "
            "resize the image"
        )
    grid = (height // patch_size, width // patch_size)
    parts = image.reshape(grid[0], patch_size, grid[1], patch_size, channels).swapaxes(1, 2)
    return parts.reshape(grid[0] * grid[1], -1).astype(np.float32) / 127.5 - 1, grid


def pack_patches(rows: Sequence[Sequence[np.ndarray]], patch_size: int, *, channels: int = 3) -> dict[str, Tensor]:
    """Images uint8 [height, width, C] of each row of a batch -> `extra` inputs of the batch:

    patches     float32 [B, P, patch_size^2 * C], the patches of all images of a row, then zeros; P is the maximum
                number of patches of a row, rounded up to a multiple of 64
    patch_grid  int64 [B, N, 2], height and width of each image in patches; 0 if a row has fewer than N images
    """
    patched = [[to_patches(image, patch_size) for image in images] for images in rows]
    longest = max([sum(len(part) for part, _ in images) for images in patched], default=0)
    patches = torch.zeros(len(rows), max(64, longest + -longest % 64), patch_size**2 * channels)
    grids = torch.zeros(len(rows), max(1, *(len(images) for images in patched), 1), 2, dtype=torch.int64)
    for row, images in enumerate(patched):
        if images:
            joined = torch.from_numpy(np.concatenate([part for part, _ in images]))
            patches[row, : len(joined)] = joined
            grids[row, : len(images)] = torch.tensor([grid for _, grid in images])
    return {"patches": patches, "patch_grid": grids}
