"""Text with images in it: drawings that their captions describe, as packed rows of tokens and packed rows of patches.

`--data.source synthetic-images` needs no download: a document is a few drawings, each followed by its caption. It is
there to try models that see; real images become the same batches through `to_patches` and `pack_patches`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from sightline.batch import IGNORE, Batch, ImageSizes, Row, RowBuilder
from sightline.data.documents import Documents
from sightline.data.loader import State, check_state, rows_of_rank
from sightline.data.patches import pack_patches
from sightline.data.tokenizer import Tokenizer

SYNTHETIC_IMAGES = "synthetic-images"
COLORS = {
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
VALIDATION_SEED = 0  # any constant: a run's seed must not change what it is validated on


def caption_documents() -> Documents:
    """Every caption there is: `a small red circle on white`."""
    captions = [
        f"a {size} {colour} {shape} on {ground}"
        for size in SIZES
        for colour in COLORS
        for shape in SHAPES
        for ground in COLORS
        if ground != colour
    ]
    return Documents.from_texts(captions, source=SYNTHETIC_IMAGES)


def render(caption: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
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
    return np.where(inside[..., None], COLORS[colour], COLORS[ground]).astype(np.uint8)


class ImageLoader:
    """An endless iterator of batches: rows packed with documents of one to three drawings and their captions.

    A document is never cut; what stays free of a row is padding. An image stands as `image_token`, once for every
    merge x merge patches, and no loss is asked for where it comes next. Every row follows from the seed and its
    number, so the number of steps is all the state there is.
    """

    def __init__(
        self,
        captions: Documents,
        tokenizer: Tokenizer,
        *,
        rows: int,
        sequence_length: int,
        images: ImageSizes | None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if images is None:
            raise ValueError(
                f"data.source {SYNTHETIC_IMAGES!r} holds images, and this model reads text alone; take a recipe of the "
                "family vlm, or another --data.source"
            )
        if tokenizer.vocab_size > images.image_token_id:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, so token {images.image_token_id} may stand for text; "
                "an image needs a token of its own: raise --model.vocab-size and set --model.image-token-id to its last "
                "token"
            )
        self._captions = [tokenizer.encode(caption) for caption in captions]
        needed = MOST_STEPS**2 + max(len(ids) for ids in self._captions)
        if sequence_length < needed:
            raise ValueError(
                f"a row of {sequence_length} tokens does not hold the largest image and its caption; use "
                f"--training.sequence-length {needed} or more"
            )
        self._mine = rows_of_rank(rows, rank, world)
        self._texts, self._tokenizer, self._images = list(captions), tokenizer, images
        self._rows, self._length, self._seed = rows, sequence_length, seed
        self._identity: State = {
            "tokenizer": tokenizer.fingerprint,
            "seed": seed,
            "rows": rows,
            "sequence_length": sequence_length,
        }
        self._step = 0

    def __iter__(self) -> ImageLoader:
        return self

    def __next__(self) -> Batch:
        first = self._step * self._rows
        rows, images = zip(*(self._row(first + row) for row in self._mine), strict=True)
        self._step += 1
        batch = Batch.from_rows(rows)
        return replace(
            batch,
            labels=batch.labels.masked_fill(batch.labels == self._images.image_token_id, IGNORE),
            extra=pack_patches(images, self._images.patch_size),
        )

    def state_dict(self) -> State:
        return {"identity": dict(self._identity), "step": self._step, "lanes": {}}

    def load_state_dict(self, state: State) -> None:
        """Go on from there. Raises as `check_state`."""
        check_state(self._identity, state)
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
            side = self._images.spatial_merge_size * self._images.patch_size
            images.append(render(self._texts[number], height * side, width * side, rng))
            caption = self._captions[number]
            begin = 0 if self._tokenizer.bos_id is None else 1
            image = [self._images.image_token_id] * (height * width)
            ids += [*(caption[:begin] if not ids else ()), *image, *caption[begin:-1]]
        return [*ids, self._tokenizer.eos_id], images


def validation_images(
    captions: Documents,
    tokenizer: Tokenizer,
    *,
    rows: int,
    rows_per_batch: int,
    sequence_length: int,
    images: ImageSizes | None,
    rank: int = 0,
    world: int = 1,
) -> list[Batch]:
    """`rows` rows, the same ones every time, in batches of `rows_per_batch`. Each rank has as many of them, the last
    ones without a label where the rows do not divide among the ranks."""
    loader = ImageLoader(
        captions, tokenizer, rows=rows, sequence_length=sequence_length, images=images, seed=VALIDATION_SEED
    )
    whole = next(loader)
    share = -(-rows // world)
    index = torch.arange(rank * share, (rank + 1) * share)
    mine = whole[index.clamp(max=rows - 1)]
    mine.labels[index >= rows] = IGNORE
    return [mine[first : first + rows_per_batch] for first in range(0, share, rows_per_batch)]
