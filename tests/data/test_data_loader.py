"""Which loader a run has, and a caller's own batches: checked, and continued where they can say where they are."""

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
    """Batches that know their number."""

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


def test_the_source_decides_the_loader() -> None:
    text = open_loader(DataConfig(), TRAINING, Documents.from_texts(["some text"]), TOKENIZER)
    drawings = open_loader(IMAGE_SECTIONS, TRAINING, CAPTIONS, TOKENIZER, images=IMAGES)
    own = open_loader(DataConfig(), TRAINING, CAPTIONS, TOKENIZER, batches=[batch_of(1, 4, 96)])
    assert [type(loader) for loader in (text, drawings, own)] == [Loader, ImageLoader, IterableLoader]
    for loader in (text, drawings, own):
        assert next(loader).shape == (4, 96)
        loader.close()


def test_drawings_are_refused_to_a_model_that_reads_text_alone() -> None:
    with pytest.raises(ValueError, match=r"'synthetic-images' holds images, .*text alone; take a recipe .*vlm, or"):
        open_loader(IMAGE_SECTIONS, TRAINING, CAPTIONS, TOKENIZER)


@pytest.mark.parametrize(
    ("data", "documents"), [(IMAGE_SECTIONS, CAPTIONS), (DataConfig(), Documents.from_texts(["abc"] * 99))]
)
def test_ranks_share_the_rows_of_a_validation(data: DataConfig, documents: Documents) -> None:
    def batches(**options: int) -> list[Batch]:
        return open_validation(data, TRAINING, ValidationConfig(rows=3), documents, TOKENIZER, images=IMAGES, **options)

    alone, (first,), (second,) = batches(), batches(rank=0, world=2), batches(rank=1, world=2)
    assert [batch.shape[0] for batch in (*alone, first, second)] == [2, 1, 2, 2]
    for name in ("tokens", "labels"):
        whole, shared = (torch.cat([getattr(batch, name) for batch in rows]) for rows in (alone, [first, second]))
        assert torch.equal(shared[:3], whole)
    assert (second.labels[1] == IGNORE).all()
    assert open_validation(data, TRAINING, ValidationConfig(every=0), documents, TOKENIZER, images=IMAGES) == []


def test_batches_with_a_state_go_on_where_they_were() -> None:
    loader = IterableLoader(Numbered(), rows=2, sequence_length=8)
    for _ in range(3):
        next(loader)
    state = json.loads(json.dumps(join_states([loader.state_dict()])))
    again = IterableLoader(Numbered(), rows=2, sequence_length=8)
    again.load_state_dict(state)
    assert torch.equal(next(again).tokens, batch_of(4).tokens)
    assert again.state_dict() == {**state, "step": 4, "shards": {"0": {"step": 4}}}


def test_each_rank_has_batches_and_a_state_of_its_own() -> None:
    def of_rank(rank: int, world: int) -> Numbered:
        assert world == 2
        batches = Numbered()
        batches.step = 10 * rank
        return batches

    ranks = [IterableLoader(of_rank, rows=4, sequence_length=8, rank=rank, world=2) for rank in range(2)]
    first = [next(loader).tokens[0, 0].item() for loader in ranks]
    assert first == [100, 1100]
    state = join_states([loader.state_dict() for loader in ranks])
    for rank, loader in enumerate(ranks):
        loader.load_state_dict(state)
        assert next(loader).tokens[0, 0].item() == 100 * (10 * rank + 2)
    with pytest.raises(ValueError, match="another number of data-parallel ranks: 2 there, 1 here"):
        IterableLoader(Numbered(), rows=4, sequence_length=8).load_state_dict(state)


def test_batches_without_a_state_are_not_continued() -> None:
    loader = IterableLoader([batch_of(1), batch_of(2)], rows=2, sequence_length=8)
    next(loader)
    for batches in ([batch_of(1), batch_of(2)], Numbered()):
        with pytest.raises(
            ValueError, match=r"stopped after step 1, and a \w+ cannot go on from there: it needs state"
        ):
            IterableLoader(batches, rows=2, sequence_length=8).load_state_dict(loader.state_dict())


def test_a_state_that_a_checkpoint_cannot_keep_is_refused() -> None:
    batches = Numbered()
    batches.state_dict = lambda: {"step": torch.tensor(1)}  # type: ignore[method-assign, assignment, dict-item]
    with pytest.raises(ValueError, match=r"state_dict\(\) of a Numbered .* Tensor is not JSON serializable; expected"):
        IterableLoader(batches, rows=2, sequence_length=8).state_dict()


def test_batches_that_do_not_fit_the_run_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of step 1 is of 2 rows of 8 tokens; expected 2 of 16"):
        next(IterableLoader([batch_of(1)], rows=2, sequence_length=16))
    loader = IterableLoader([batch_of(1)], rows=2, sequence_length=8)
    next(loader)
    with pytest.raises(ValueError, match=r"ended after step 1, before the run did; .*set training.steps 1"):
        next(loader)
    with pytest.raises(ValueError, match=r"one list for 2 data-parallel ranks.*expected a function of \(rank, world\)"):
        IterableLoader([batch_of(1)], rows=2, sequence_length=8, world=2)
