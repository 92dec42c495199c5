"""Batches with difficult rows: documents of many lengths, of one token, of the full row, and a row of padding only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from sightline import Batch
from sightline.batch import IGNORE, RowBuilder
from sightline.models import VLMConfig

LENGTH = 52  # not divisible by 8 or by a tile
LENGTHS = [[17, 1, 5, 1, 1, 23, 3], [LENGTH], [1, 30, 1, 11], [], [2, 50]]
"""Document lengths of each row; the rest of a row is padding."""


def pack(lengths: Sequence[Sequence[int]], vocab_size: int = 512, length: int = LENGTH, seed: int = 0) -> Batch:
    """Rows of documents with these lengths and random tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = [RowBuilder(length) for _ in lengths]
    for row, documents in zip(rows, lengths, strict=True):
        for size in documents:
            row.add(torch.randint(vocab_size - 1, (size,), generator=generator).tolist())
    return Batch.from_rows([row.finish(pad_token=0) for row in rows])


def pack_images(config: VLMConfig) -> Batch:
    """The rows of LENGTHS with images of 1 to 6 tokens; two rows have no image, one has two adjacent images."""
    batch = pack(LENGTHS, config.vocab_size)
    images = [
        [(0, 2, 4), (6, 2, 2), (18, 4, 4), (29, 2, 12)],
        [(10, 6, 4), (16, 2, 2)],
        [(0, 2, 2), (41, 4, 2)],
        [],
        [],
    ]
    grid = torch.zeros(len(images), 4, 2, dtype=torch.int64)
    # As many patches as tokens: code that distinguishes the two by shape would fail.
    patches = torch.randn(len(images), LENGTH, config.vision.patch_channels, generator=torch.Generator().manual_seed(1))
    tokens, labels = batch.tokens.clone(), batch.labels.clone()
    for row, images_of_row in enumerate(images):
        for number, (start, height, width) in enumerate(images_of_row):
            tokens[row, start : start + height * width // config.spatial_merge_size**2] = config.image_token_id
            grid[row, number] = torch.tensor([height, width])
    labels[:, :-1] = torch.where(labels[:, :-1] == IGNORE, IGNORE, tokens[:, 1:])
    return replace(batch, tokens=tokens, labels=labels, extra={"patches": patches, "patch_grid": grid})


def random_lengths(seed: int, rows: int = 3) -> list[list[int]]:
    """Random document lengths of each row, a third of them 1; a row may end with padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = []
    for _ in range(rows):
        sizes = torch.randint(-9, 20, (LENGTH,), generator=generator).clamp(min=1).tolist()
        free, row = LENGTH, []
        while free > 0 and len(row) < 3 + seed:
            row.append(min(sizes.pop(), free))
            free -= row[-1]
        lengths.append(row)
    return lengths
