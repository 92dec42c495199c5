"""Selection of the loader, and user-provided batches: their checks, and resuming from their state."""

import json
from collections.abc import Iterator

import pytest
import torch

from sightline.batch import IGNORE, Batch, ImageSizes
from sightline.config import DataConfig, TrainingConfig, ValidationConfig
from sightline.data import (
    SYNTHETIC_IMAGES,
    Documents,
    ImageLoader,
    IterableLoader,
    Loader,
    join_states,
    load_documents,
    open_loader,
    open_validation,
    train_tokenizer,
)

CAPTIONS = load_documents(DataConfig(source=SYNTHETIC_IMAGES))
TOKENIZER = train_tokenizer(CAPTIONS, 300)
IMAGES = ImageSizes(patch_size=4, spatial_merge_size=2, image_token_id=511)
IMAGE_SECTIONS = DataConfig(source=SYNTHETIC_IMAGES)
TRAINING = TrainingConfig(sequence_length=96, global_batch_size=4, micro_batch_size=2)


def batch_of(step: int, rows: int = 2, length: int = 8) -> Batch:
    return Batch.from_documents([[100 * step + row] * length for row in range(rows)], length)


class Numbered:
    """Batches whose tokens contain the step, with a state."""

    def __init__(self) -> None:
        self.step = 0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            self.step += 1
            yield batch_of(self.step)

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


def test_source_selects_loader() -> None:
    text = open_loader(DataConfig(), TRAINING, Documents.from_texts(["some text"]), TOKENIZER)
    images = open_loader(IMAGE_SECTIONS, TRAINING, CAPTIONS, TOKENIZER, images=IMAGES)
    user = open_loader(DataConfig(), TRAINING, CAPTIONS, TOKENIZER, batches=[batch_of(1, 4, 96)])
    assert [type(loader) for loader in (text, images, user)] == [Loader, ImageLoader, IterableLoader]
    for loader in (text, images, user):
        assert next(loader).shape == (4, 96)
        loader.close()


def test_images_for_text_only_model_raise() -> None:
    with pytest.raises(ValueError, match=r"'synthetic-images' contains images, .*text-only; use a recipe .*vlm, or"):
        open_loader(IMAGE_SECTIONS, TRAINING, CAPTIONS, TOKENIZER)


@pytest.mark.parametrize(
    ("data", "documents"), [(IMAGE_SECTIONS, CAPTIONS), (DataConfig(), Documents.from_texts(["abc"] * 99))]
)
def test_validation_rows_are_divided_over_ranks(data: DataConfig, documents: Documents) -> None:
    def batches(**options: int) -> list[Batch]:
        return open_validation(data, TRAINING, ValidationConfig(rows=3), documents, TOKENIZER, images=IMAGES, **options)

    single, (first,), (second,) = batches(), batches(rank=0, world=2), batches(rank=1, world=2)
    assert [batch.shape[0] for batch in (*single, first, second)] == [2, 1, 2, 2]
    for name in ("tokens", "labels"):
        expected, actual = (torch.cat([getattr(batch, name) for batch in rows]) for rows in (single, [first, second]))
        assert torch.equal(actual[:3], expected)
    assert (second.labels[1] == IGNORE).all()
    assert open_validation(data, TRAINING, ValidationConfig(every=0), documents, TOKENIZER, images=IMAGES) == []


def test_batches_with_state_resume() -> None:
    loader = IterableLoader(Numbered(), rows=2, sequence_length=8)
    for _ in range(3):
        next(loader)
    state = json.loads(json.dumps(join_states([loader.state_dict()])))
    resumed = IterableLoader(Numbered(), rows=2, sequence_length=8)
    resumed.load_state_dict(state)
    assert torch.equal(next(resumed).tokens, batch_of(4).tokens)
    assert resumed.state_dict() == {**state, "step": 4, "shards": {"0": {"step": 4}}}


def test_each_rank_has_its_own_batches_and_state() -> None:
    def batches_of_rank(rank: int, world: int) -> Numbered:
        assert world == 2
        batches = Numbered()
        batches.step = 10 * rank
        return batches

    ranks = [IterableLoader(batches_of_rank, rows=4, sequence_length=8, rank=rank, world=2) for rank in range(2)]
    first = [next(loader).tokens[0, 0].item() for loader in ranks]
    assert first == [100, 1100]
    state = join_states([loader.state_dict() for loader in ranks])
    for rank, loader in enumerate(ranks):
        loader.load_state_dict(state)
        assert next(loader).tokens[0, 0].item() == 100 * (10 * rank + 2)
    with pytest.raises(ValueError, match="another number of data-parallel ranks: got 1, expected 2"):
        IterableLoader(Numbered(), rows=4, sequence_length=8).load_state_dict(state)


def test_batches_without_state_do_not_resume() -> None:
    loader = IterableLoader([batch_of(1), batch_of(2)], rows=2, sequence_length=8)
    next(loader)
    for batches in ([batch_of(1), batch_of(2)], Numbered()):
        with pytest.raises(
            ValueError, match=r"stopped after step 1, and a \w+ cannot resume there: batches need state"
        ):
            IterableLoader(batches, rows=2, sequence_length=8).load_state_dict(loader.state_dict())


def test_state_that_is_not_json_raises() -> None:
    batches = Numbered()
    batches.state_dict = lambda: {"step": torch.tensor(1)}  # type: ignore[method-assign, assignment, dict-item]
    with pytest.raises(ValueError, match=r"state_dict\(\) of a Numbered .* Tensor is not JSON serializable; expected"):
        IterableLoader(batches, rows=2, sequence_length=8).state_dict()


def test_batches_of_wrong_shape_or_number_raise() -> None:
    with pytest.raises(ValueError, match=r"of step 1 has 2 rows of 8 tokens; expected 2 rows of 16"):
        next(IterableLoader([batch_of(1)], rows=2, sequence_length=16))
    loader = IterableLoader([batch_of(1)], rows=2, sequence_length=8)
    next(loader)
    with pytest.raises(ValueError, match=r"ended after step 1, before the run did; .*set training.steps 1"):
        next(loader)
    with pytest.raises(
        ValueError, match=r"one list of batches for 2 data-parallel ranks.*a function of \(rank, world\)"
    ):
        IterableLoader([batch_of(1)], rows=2, sequence_length=8, world=2)
