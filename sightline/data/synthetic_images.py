"""Synthetic images with captions, as packed rows of tokens and packed rows of patches.

`--data.source synthetic-images` is test data for vision-language models that needs no download. A document is a few
images, each followed by its caption. `to_patches` and `pack_patches` do the same with real images.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from sightline.batch import IGNORE, Batch, ImageSizes, Row, RowBuilder
from sightline.data.documents import Documents
from sightline.data.epochs import PADDING_ROW, EpochLoader
from sightline.data.packing import DOCUMENT_ORDER
from sightline.data.patches import pack_patches
from sightline.data.permutation import Permutation
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


class Image(NamedTuple):
    """An image before it is rendered: index of its caption, height and width in image tokens."""

    caption: int
    height: int
    width: int


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


class ImageLoader(EpochLoader):
    """Iterator of batches: rows packed with documents of one to three images and their captions; see `EpochLoader`.

    An epoch has each caption once. Documents are never split; rows are padded. An image is represented by placeholder
    tokens, one for every `spatial_merge_size` x `spatial_merge_size` patches, which are not labels. The shape in an
    image is at another position in each epoch.
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
        epochs: int | None = None,
    ) -> None:
        images = check_images(images)
        if tokenizer.vocab_size > images.image_token_id:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, so the image token {images.image_token_id} may also "
                "be text; expected an id that the tokenizer does not use: increase --model.vocab-size and set "
                "--model.image-token-id to the last id"
            )
        super().__init__(rows=rows, seed=seed, rank=rank, world=world, epochs=epochs)
        self._captions = tokenizer.encode_all(list(captions))
        needed = MAX_SIDE**2 + max(len(ids) for ids in self._captions)
        if sequence_length < needed:
            raise ValueError(
                f"a row of {sequence_length} tokens is too short for the largest image and its caption; use "
                f"--training.sequence-length {needed} or more"
            )
        self._texts, self._tokenizer, self._images = list(captions), tokenizer, images
        self._length, self._seed = sequence_length, seed
        self._plan = self._pack(Permutation(len(captions), seed, 0, DOCUMENT_ORDER)(np.arange(len(captions))))
        self.rows_per_epoch = len(self._plan)
        documents = sum(map(len, self._plan))
        self.contents = (
            f"{documents:,} documents with {len(captions):,} images, {len(self._plan):,} rows of {sequence_length:,}"
        )
        self.identity = {
            "documents": len(captions),
            "contents": captions.digest,
            "tokenizer": tokenizer.fingerprint,
            "seed": seed,
            "rows": rows,
            "sequence_length": sequence_length,
        }

    def build(self, rows: np.ndarray, plan_rows: np.ndarray) -> Batch:
        built, images = zip(*map(self._build_row, rows.tolist(), plan_rows.tolist()), strict=True)
        batch = Batch.from_rows(built)
        return replace(
            batch,
            labels=batch.labels.masked_fill(batch.labels == self._images.image_token_id, IGNORE),
            extra=pack_patches(images, self._images.patch_size),
        )

    def _pack(self, order: np.ndarray) -> list[list[list[Image]]]:
        """Return the documents of each row: all captions in this order, and in a row as many documents as fit."""
        rng = np.random.default_rng(self._seed)
        documents: list[list[Image]] = []
        wanted = 0
        for caption in order.tolist():
            height, width = rng.integers(1, MAX_SIDE, size=2, endpoint=True).tolist()
            image = Image(caption, height, width)
            if wanted == 0 or len(self._encode([*documents[-1], image])) > self._length:
                documents.append([])
                wanted = int(rng.integers(1, MAX_IMAGES, endpoint=True))
            documents[-1].append(image)
            wanted -= 1
        rows: list[list[list[Image]]] = []
        free = 0
        for document in documents:
            size = len(self._encode(document))
            if size > free:
                rows.append([])
                free = self._length
            rows[-1].append(document)
            free -= size
        return rows

    def _build_row(self, number: int, plan_row: int) -> tuple[Row, list[np.ndarray]]:
        """Return row `number` of the run and its images."""
        rng = np.random.default_rng((self._seed, number))
        row, images = RowBuilder(self._length), []
        side = self._images.spatial_merge_size * self._images.patch_size
        for document in self._plan[plan_row] if plan_row != PADDING_ROW else []:
            row.add(self._encode(document))
            images += [render(self._texts[i.caption], i.height * side, i.width * side, rng) for i in document]
        return row.finish(self._tokenizer.eos_id), images

    def _encode(self, document: list[Image]) -> list[int]:
        """Return the token ids [begin] image caption image caption ... [end]."""
        ids = [] if self._tokenizer.bos_id is None else [self._tokenizer.bos_id]
        begin = len(ids)
        for image in document:
            ids += [self._images.image_token_id] * (image.height * image.width)
            ids += self._captions[image.caption][begin:-1]
        return [*ids, self._tokenizer.eos_id]


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
    options: dict[str, Any] = {"sequence_length": sequence_length, "images": images, "seed": VALIDATION_SEED}
    with closing(ImageLoader(captions, tokenizer, rows=rows, **options)) as loader:
        all_rows = next(loader)
    per_rank = -(-rows // world)
    index = torch.arange(rank * per_rank, (rank + 1) * per_rank)
    local = all_rows[index.clamp(max=rows - 1)]
    local.labels[index >= rows] = IGNORE
    return [local[first : first + rows_per_batch] for first in range(0, per_rank, rows_per_batch)]
