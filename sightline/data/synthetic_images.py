"""Text with images in it: packed rows of tokens and packed rows of patches, from drawings that their captions describe.

`--data.source synthetic-images` needs no download: a document is a few drawings, each followed by its caption. It is
there to try models that see; real images become the same batches through `to_patches` and `pack_patches`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sightline.batch import IGNORE, Batch, Row, RowBuilder
from sightline.data.documents import Documents
from sightline.data.loader import rows_of_rank
from sightline.data.tokenizer import Tokenizer

SYNTHETIC_IMAGES = "synthetic-images"
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 50),
    "purple": (140, 50, 170),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.5, "large": 0.9}
"""Share of the image's shorter side."""
MOST_IMAGES = 3
"""Of a document."""
MOST_STEPS = 4
"""Height and width of a drawing, in image tokens."""


def caption_documents() -> Documents:
    """Every caption there is: `a small red circle on white`."""
    captions = [
        f"a {size} {colour} {shape} on {ground}"
        for size in SIZES
        for colour in COLOURS
        for shape in SHAPES
        for ground in COLOURS
        if ground != colour
    ]
    return Documents.from_texts(captions, source=SYNTHETIC_IMAGES)


def draw(caption: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """What the caption says, somewhere in the image: uint8 [height, width, 3], in pixels."""
    _, size, colour, shape, _, ground = caption.split()
    half = SIZES[size] * min(height, width) / 2
    y = np.arange(height)[:, None] + 0.5 - rng.uniform(half, height - half)
    x = np.arange(width)[None, :] + 0.5 - rng.uniform(half, width - half)
    inside = {
        "circle": x**2 + y**2 <= half**2,
        "square": np.maximum(abs(x), abs(y)) <= 0.85 * half,
        "triangle": (abs(y) <= half) & (2 * abs(x) <= y + half),
        "cross": (np.minimum(abs(x), abs(y)) <= half / 4) & (np.maximum(abs(x), abs(y)) <= half),
    }[shape]
    return np.where(inside[..., None], COLOURS[colour], COLOURS[ground]).astype(np.uint8)


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


class ImageLoader:
    """An endless iterator of batches: rows packed with documents of one to three drawings and their captions.

    A document is never cut; what stays free of a row is padding. An image stands as `image_token`, once for every
    merge x merge patches, and no loss is asked for where it comes next. Every row follows from the seed and its
    number, so the number of steps is all the state there is. Rank r of `world` has the rows of a step from
    r * rows / world on, as in `Loader`.
    """

    def __init__(
        self,
        captions: Documents,
        tokenizer: Tokenizer,
        *,
        rows: int,
        sequence_length: int,
        patch_size: int,
        merge: int,
        image_token: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if tokenizer.vocab_size > image_token:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, so token {image_token} may stand for text; an image "
                f"needs a token of its own: raise --model.vocab-size and set --model.image-token to its last token"
            )
        self._captions = [tokenizer.encode(caption) for caption in captions]
        needed = MOST_STEPS**2 + max(len(ids) for ids in self._captions)
        if sequence_length < needed:
            raise ValueError(
                f"a row of {sequence_length} tokens does not hold the largest image and its caption; use "
                f"--training.sequence-length {needed} or more"
            )
        self._mine = rows_of_rank(rows, rank, world)
        self._texts, self._tokenizer, self._rows, self._seed = list(captions), tokenizer, rows, seed
        self._length, self._patch_size, self._merge = sequence_length, patch_size, merge
        self._image_token = image_token
        self._step = 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self._step * self._rows
        rows, images = zip(*(self._row(first + row) for row in self._mine), strict=True)
        self._step += 1
        batch = Batch.from_rows(rows)
        return replace(
            batch,
            labels=batch.labels.masked_fill(batch.labels == self._image_token, IGNORE),
            extra=pack_patches(images, self._patch_size),
        )

    def state_dict(self) -> dict[str, Any]:
        """The number of steps handed out, and what must be the same for the next one to be the same."""
        identity = {
            "tokenizer": self._tokenizer.fingerprint,
            "seed": self._seed,
            "rows": self._rows,
            "sequence_length": self._length,
        }
        return {"identity": identity, "step": self._step, "lanes": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. Errors: ValueError where the state was made with another tokenizer, seed or row."""
        expected = self.state_dict()["identity"]
        if state.get("identity") != expected:
            raise ValueError(
                f"the loader's state was saved with {state.get('identity')}, here it is {expected}; continue with what "
                "it was saved with, or start a new run in another output directory"
            )
        self._step = state["step"]

    def close(self) -> None:
        """Nothing to close."""

    def _row(self, number: int) -> tuple[Row, list[np.ndarray]]:
        """A row of the run by its number, and its images. The first document that does not fit ends it."""
        rng = np.random.default_rng((self._seed, number))
        row, images = RowBuilder(self._length), []
        while True:
            ids, drawn = self._document(rng)
            if len(ids) <= row.room:
                row.add(ids)
                images += drawn
            elif row.tokens:
                return row.finish(self._tokenizer.eos_id), images

    def _document(self, rng: np.random.Generator) -> tuple[list[int], list[np.ndarray]]:
        """[begin] image caption image caption ... [end], and the images."""
        ids: list[int] = []
        images = []
        for number in rng.integers(len(self._texts), size=rng.integers(1, MOST_IMAGES, endpoint=True)).tolist():
            height, width = rng.integers(1, MOST_STEPS, size=2, endpoint=True).tolist()
            side = self._merge * self._patch_size
            images.append(draw(self._texts[number], height * side, width * side, rng))
            caption = self._captions[number]
            begin = 0 if self._tokenizer.bos_id is None else 1
            ids += [*(caption[:begin] if not ids else ()), *[self._image_token] * (height * width), *caption[begin:-1]]
        return [*ids, self._tokenizer.eos_id], images
