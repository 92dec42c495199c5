"""Synthetic images with captions: their tokens and patches in the rows, and resuming from a state."""

import json
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
import torch
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from sightline.batch import PADDING, Batch, ImageSizes
from sightline.config import DataConfig
from sightline.data import (
    ImageLoader,
    join_states,
    load_documents,
    pack_patches,
    split_documents,
    to_patches,
    train_tokenizer,
)
from sightline.data.synthetic_images import COLORS, SYNTHETIC_IMAGES, caption_documents, render

IMAGE = 511
CAPTIONS = load_documents(DataConfig(source=SYNTHETIC_IMAGES))
TOKENIZER = train_tokenizer(CAPTIONS, IMAGE)
SIZES = {"rows": 3, "sequence_length": 96, "images": ImageSizes(4, 2, IMAGE), "seed": 5}


def loader(**options) -> ImageLoader:
    return ImageLoader(CAPTIONS, TOKENIZER, **{**SIZES, **options})


def assert_same(one: Batch, other: Batch) -> None:
    for name in ("tokens", "labels", "document_ids", "positions"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    assert all(torch.equal(one.extra[name], other.extra[name]) for name in ("patches", "patch_grid"))


def captions_and_images(batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the caption after each image of the batch, and the patches of the image."""
    for row in range(batch.shape[0]):
        grid = batch.extra["patch_grid"][row]
        tokens, position, first = batch.tokens[row].tolist(), 0, 0
        for height, width in grid[grid.prod(dim=1) > 0].tolist():
            position = tokens.index(IMAGE, position)
            count = height * width // 4
            assert tokens[position : position + count] == [IMAGE] * count and tokens[position + count] != IMAGE
            position += count
            end = next(i for i in range(position, len(tokens)) if tokens[i] in (IMAGE, TOKENIZER.eos_id))
            yield TOKENIZER.decode(tokens[position:end]), batch.extra["patches"][row, first : first + height * width]
            first += height * width
        assert IMAGE not in tokens[position:] and not batch.extra["patches"][row, first:].any()


def test_every_image_precedes_its_caption() -> None:
    captions = set(CAPTIONS)
    assert len(captions) == len(CAPTIONS) == 2 * 7 * 4 * 6
    seen = set()
    for batch in islice(loader(), 5):
        for caption, patches in captions_and_images(batch):
            assert caption in captions
            seen.add(caption)
            _, _, color, _, _, background = caption.split()
            colors = {tuple(pixel) for pixel in ((patches.reshape(-1, 3) + 1) * 127.5).round().int().tolist()}
            assert colors == {COLORS[color], COLORS[background]}
    assert len(seen) > 20


def test_documents_are_not_split_and_image_tokens_are_not_labels() -> None:
    for batch in islice(loader(), 5):
        real = batch.document_ids != PADDING
        assert 0.5 < batch.fill() <= 1
        starts = batch.positions[real] == 0
        assert torch.equal(batch.tokens[real][starts], torch.full_like(batch.tokens[real][starts], TOKENIZER.bos_id))
        assert starts.sum() == (batch.tokens[real] == TOKENIZER.eos_id).sum()
        assert not (batch.labels == IMAGE).any() and (batch.tokens == IMAGE).any()
        following = batch.tokens[:, 1:]
        wanted = (batch.document_ids[:, 1:] == batch.document_ids[:, :-1]) & real[:, 1:] & (following != IMAGE)
        assert torch.equal(batch.labels[:, :-1], torch.where(wanted, following, -100))


def test_resumed_batches_are_the_same() -> None:
    source = loader()
    for _ in range(3):
        next(source)
    state = json.loads(json.dumps(source.state_dict()))
    resumed = loader()
    resumed.load_state_dict(state)
    for _ in range(3):
        assert_same(next(source), next(resumed))
    with pytest.raises(AssertionError):
        assert_same(next(source), next(loader(seed=6)))
    with pytest.raises(ValueError, match=r"saved with another --seed: got 6, expected 5"):
        loader(seed=6).load_state_dict(state)


def test_an_epoch_has_each_caption_once() -> None:
    """The images of the second epoch are others, and the rows after the last epoch are padding."""
    source = loader(rows=4, epochs=2)
    assert source.steps == -(-2 * source.rows_per_epoch // 4)
    rows = [batch[torch.tensor([row])] for batch in islice(source, source.steps) for row in range(4)]
    epochs = [rows[: source.rows_per_epoch], rows[source.rows_per_epoch :][: source.rows_per_epoch]]
    for epoch in epochs:
        assert sorted(caption for row in epoch for caption, _ in captions_and_images(row)) == sorted(CAPTIONS)
    padding = rows[2 * source.rows_per_epoch :]
    assert len(padding) == -2 * source.rows_per_epoch % 4 > 0
    assert all(row.fill() == 0 and not row.extra["patches"].any() for row in padding)
    first, second = ([row.tokens.tolist() for row in epoch] for epoch in epochs)
    assert first != second and sorted(first) == sorted(second)


def test_state_of_an_older_version_continues_with_a_warning() -> None:
    state = loader().state_dict()
    old = {"identity": {name: state["identity"][name] for name in ("tokenizer", "seed", "rows", "sequence_length")}}
    source, expected = loader(), loader()
    assert "older version" in (source.load_state_dict({**old, "step": 2, "shards": {}}) or "")
    assert_same(next(source), list(islice(expected, 3))[2])


def test_rows_of_a_step_are_divided_over_ranks() -> None:
    single, ranks = loader(rows=4), [loader(rows=4, rank=rank, world=2) for rank in range(2)]
    for _ in range(3):
        full, parts = next(single), [next(source) for source in ranks]
        assert torch.equal(full.tokens, torch.cat([part.tokens for part in parts]))
        assert torch.equal(full.labels, torch.cat([part.labels for part in parts]))
        for rank, part in enumerate(parts):
            patches, expected = part.extra["patches"], full.extra["patches"][2 * rank :][:2]
            assert torch.equal(patches, expected[:, : patches.shape[1]]) and not expected[:, patches.shape[1] :].any()
    resumed = [loader(rows=4, rank=rank, world=4) for rank in range(4)]
    for source in resumed:
        source.load_state_dict(join_states([other.state_dict() for other in ranks]))
    assert torch.equal(next(single).tokens, torch.cat([next(source).tokens for source in resumed]))


def test_rows_not_divisible_by_ranks_raise() -> None:
    with pytest.raises(ValueError, match=r"3 rows per step .*not divisible by 2 data-parallel ranks .*: \[1, 3\]"):
        loader(rank=0, world=2)


def test_patches_equal_siglip2() -> None:
    image = np.random.default_rng(0).integers(256, size=(8, 12, 3), dtype=np.uint8)
    patches, grid = to_patches(image, 4)
    assert grid == (2, 3)
    theirs = convert_image_to_patches(image.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1, 4)
    np.testing.assert_allclose(patches, theirs, atol=1e-6)
    with pytest.raises(ValueError, match="got an image of 8 x 12 pixels; expected multiples of the patch size 5"):
        to_patches(image, 5)


def test_pack_patches() -> None:
    one, two = (np.full((4 * h, 4 * w, 3), value, dtype=np.uint8) for h, w, value in [(2, 3, 255), (1, 1, 0)])
    extra = pack_patches([[one, two], [], [two]], 4)
    assert extra["patch_grid"].tolist() == [[[2, 3], [1, 1]], [[0, 0], [0, 0]], [[1, 1], [0, 0]]]
    assert extra["patches"].shape == (3, 64, 48)
    assert extra["patches"][:, :, 0].sum(dim=1).tolist() == [6 - 1, 0, -1]
    assert pack_patches([[one] * 11], 4)["patches"].shape == (1, 128, 48)
    assert pack_patches([[], []], 4)["patch_grid"].tolist() == [[[0, 0]], [[0, 0]]]


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "cross"])
def test_large_shape_covers_more_pixels_than_small_shape(shape: str) -> None:
    def covered(size: str) -> int:
        image = render(f"a {size} red {shape} on blue", 32, 48, np.random.default_rng(0))
        assert image.shape == (32, 48, 3) and image.dtype == np.uint8
        return int((image == COLORS["red"]).all(axis=2).sum())

    assert 30 < 2 * covered("small") < covered("large") < 32 * 48


def test_held_out_captions_are_not_in_training() -> None:
    training, held_out = split_documents(caption_documents(), 0.05)
    assert len(held_out) == 17 and not set(training) & set(held_out)


def test_too_short_rows_and_text_image_tokens_raise() -> None:
    with pytest.raises(
        ValueError, match=r"a row of 20 tokens is too short for .*--training.sequence-length \d\d or more"
    ):
        loader(sequence_length=20)
    with pytest.raises(ValueError, match=r"has \d+ tokens, so the image token 100 may also be text"):
        loader(images=ImageSizes(4, 2, 100))
