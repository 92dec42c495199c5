"""Synthetic images with captions, as packed rows of tokens and packed rows of patches.

`--data.source synthetic-images` is test data for vision-language models that needs no download. A document is a few
images, each followed by its caption. `to_patches` and `pack_patches` do the same with real images.
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
"""Size of a shape as a fraction of the image's shorter side."""
MAX_IMAGES = 3
"""Maximum number of images per document."""
MAX_SIDE = 4
"""Maximum height and width of an image, in image tokens."""
VALIDATION_SEED = 0  # constant, so that the seed of a run does not change the validation images


def caption_documents() -> Documents:
    """Return all captions, of the form `a small red circle on white`."""
    captions = [
        f"a {size} {color} {shape} on {background}"
        for size in SIZES
        for color in COLORS
        for shape in SHAPES
        for background in COLORS
        if background != color
    ]
    return Documents.from_texts(captions, source=SYNTHETIC_IMAGES)


def render(caption: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Render the caption as uint8 [height, width, 3], with the shape at a random position."""
    _, size, color, shape, _, background = caption.split()
    half = SIZES[size] * min(height, width) / 2
    y = np.arange(height)[:, None] + 0.5 - rng.uniform(half, height - half)
    x = np.arange(width)[None, :] + 0.5 - rng.uniform(half, width - half)
    inside = {
        "circle": x**2 + y**2 <= half**2,
        "square": np.maximum(abs(x), abs(y)) <= 0.85 * half,
        "triangle": (abs(y) <= half) & (2 * abs(x) <= y + half),
        "cross": (np.minimum(abs(x), abs(y)) <= half / 4) & (np.maximum(abs(x), abs(y)) <= half),
    }[shape]
    return np.where(inside[..., None], COLORS[color], COLORS[background]).astype(np.uint8)


class ImageLoader:
    """Infinite iterator of batches: rows packed with documents of one to three images and their captions.

    Documents are never split; rows are padded. An image is represented by placeholder tokens, one for every
    `spatial_merge_size` x `spatial_merge_size` patches, which are not labels. Each row is generated from the seed and
    the index of the row in the run, so the state is only the number of steps.
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
        images = check_images(images)
        if tokenizer.vocab_size > images.image_token_id:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, so the image token {images.image_token_id} may also "
                "be text; expected an id that the tokenizer does not use: increase --model.vocab-size and set "
                "--model.image-token-id to the last id"
            )
        self._captions = [tokenizer.encode(caption) for caption in captions]
        needed = MAX_SIDE**2 + max(len(ids) for ids in self._captions)
        if sequence_length < needed:
            raise ValueError(
                f"a row of {sequence_length} tokens is too short for the largest image and its caption; use "
                f"--training.sequence-length {needed} or more"
            )
        self._local_rows = rows_of_rank(rows, rank, world)
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
        rows, images = zip(*(self._row(first + row) for row in self._local_rows), strict=True)
        self._step += 1
        batch = Batch.from_rows(rows)
        return replace(
            batch,
            labels=batch.labels.masked_fill(batch.labels == self._images.image_token_id, IGNORE),
            extra=pack_patches(images, self._images.patch_size),
        )

    def state_dict(self) -> State:
        return {"identity": dict(self._identity), "step": self._step, "shards": {}}

    def load_state_dict(self, state: State) -> None:
        """Continue from this state.

        Raises:
            ValueError: if the state was saved by another loader; see `check_state`.
        """
        check_state(self._identity, state)
        self._step = state["step"]

    def close(self) -> None:
        """Do nothing; this loader has no resources."""

    def _row(self, index: int) -> tuple[Row, list[np.ndarray]]:
        """Return row `index` of the run and its images. The first document that does not fit ends the row."""
        rng = np.random.default_rng((self._seed, index))
        row, images = RowBuilder(self._length), []
        while True:
            ids, document_images = self._document(rng)
            if len(ids) <= row.free:
                row.add(ids)
                images += document_images
            elif row.tokens:
                return row.finish(self._tokenizer.eos_id), images

    def _document(self, rng: np.random.Generator) -> tuple[list[int], list[np.ndarray]]:
        """Return the token ids [begin] image caption image caption ... [end], and the images."""
        ids: list[int] = []
        images = []
        for index in rng.integers(len(self._texts), size=rng.integers(1, MAX_IMAGES, endpoint=True)).tolist():
            height, width = rng.integers(1, MAX_SIDE, size=2, endpoint=True).tolist()
            side = self._images.spatial_merge_size * self._images.patch_size
            images.append(render(self._texts[index], height * side, width * side, rng))
            caption = self._captions[index]
            begin = 0 if self._tokenizer.bos_id is None else 1
            image = [self._images.image_token_id] * (height * width)
            ids += [*(caption[:begin] if not ids else ()), *image, *caption[begin:-1]]
        return [*ids, self._tokenizer.eos_id], images


def check_images(images: ImageSizes | None) -> ImageSizes:
    """Return the image properties of a model.

    Raises:
        ValueError: if it has none, because it is text-only.
    """
    if images is None:
        raise ValueError(
            f"data.source {SYNTHETIC_IMAGES!r} contains images, but this model is text-only; use a recipe of the "
            "family vlm, or another --data.source"
        )
    return images


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
    """Return `rows` rows, always the same, in batches of `rows_per_batch`.

    All ranks have the same number of rows: if necessary, the last row is repeated without labels.
    """
    loader = ImageLoader(
        captions, tokenizer, rows=rows, sequence_length=sequence_length, images=images, seed=VALIDATION_SEED
    )
    all_rows = next(loader)
    per_rank = -(-rows // world)
    index = torch.arange(rank * per_rank, (rank + 1) * per_rank)
    local = all_rows[index.clamp(max=rows - 1)]
    local.labels[index >= rows] = IGNORE
    return [local[first : first + rows_per_batch] for first in range(0, per_rank, rows_per_batch)]
