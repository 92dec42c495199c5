"""The loader: every document once an epoch, and the same batches to the bit from any place it is restored to."""

import json
import subprocess
import sys
from itertools import islice

import pytest
import torch

from sightline.batch import PADDING, Batch
from sightline.data import Documents, Loader, split_documents, train_tokenizer, validation_batches

NAMES = ("tokens", "labels", "document_ids", "positions")
LENGTHS = [3, 11, 1, 60, 7, 7, 2, 25, 14, 1, 9]
TEXTS = [chr(ord("a") + number) * length for number, length in enumerate(LENGTHS)]
DOCUMENTS = Documents.from_texts(TEXTS)
TOKENIZER = train_tokenizer(DOCUMENTS, 258)  # no merges: a token is a letter
SIZES = {"rows": 2, "sequence_length": 16}
BOTH = pytest.mark.parametrize("packing", ["stream", "best_fit"])


def loader(**options) -> Loader:
    return Loader(DOCUMENTS, TOKENIZER, **{**SIZES, "seed": 3, **options})


def take(source: Loader, count: int) -> list[Batch]:
    batches = list(islice(source, count))
    source.close()
    return batches


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for name in NAMES:
            assert torch.equal(getattr(one, name), getattr(other, name))


def texts(batches: list[Batch]) -> list[str]:
    """The letters of a stream of batches, one string a document (the last one may be cut)."""
    tokens = torch.cat([batch.tokens.flatten() for batch in batches])
    tokens = tokens[torch.cat([batch.document_ids.flatten() for batch in batches]) != PADDING]
    starts = (tokens == TOKENIZER.bos_id).nonzero().flatten().tolist()
    return [TOKENIZER.decode(part.tolist()) for part in torch.tensor_split(tokens, starts)[1:]]


def test_a_batch_is_the_documents_packed_in_order() -> None:
    batches = take(loader(), 30)
    order = texts(batches)[:-1]
    packed = Batch.from_documents([TOKENIZER.encode(text) for text in order], 16)
    stacked = Batch(**{name: torch.cat([getattr(batch, name) for batch in batches]) for name in NAMES})
    rows = packed.shape[0] - 1  # the oracle pads its last row
    assert rows > 40
    assert_same([stacked[:rows]], [packed[:rows]])
    assert {batch.shape for batch in batches} == {(2, 16)}
    assert {batch.fill() for batch in batches} == {1.0}


def test_an_epoch_reads_every_document_once_and_each_in_another_order() -> None:
    order = texts(take(loader(), 40))
    epochs = [order[at : at + len(TEXTS)] for at in range(0, len(order), len(TEXTS))][:4]
    assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_seed_decides_the_order() -> None:
    assert_same(take(loader(), 5), take(loader(), 5))
    assert texts(take(loader(seed=4), 20)) != texts(take(loader(seed=3), 20))


def test_ranks_share_an_epoch_without_overlap() -> None:
    ranks = [texts(take(loader(rank=rank, world=3), 20)) for rank in range(3)]
    sizes = [4, 4, 3]  # of 11 documents
    first_epoch = [rank[:size] for rank, size in zip(ranks, sizes, strict=True)]
    assert sorted(text for rank in first_epoch for text in rank) == sorted(TEXTS)
    alone = texts(take(loader(), 20))[: len(TEXTS)]
    assert first_epoch == [alone[rank::3] for rank in range(3)]


@BOTH
def test_best_fit_and_stream_hold_every_document(packing: str) -> None:
    batches = take(loader(packing=packing, sequence_length=64), 60)
    seen = set(texts(batches))
    assert seen >= set(TEXTS)
    fill = sum(batch.fill() for batch in batches) / 60
    assert fill == 1.0 if packing == "stream" else fill > 0.9


@BOTH
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (2, 3)])
def test_restored_at_any_place_the_batches_are_the_same(packing: str, rank: int, world: int) -> None:
    count, options = 40, {"packing": packing, "rank": rank, "world": world}
    source, states, straight = loader(**options), [], []
    for _ in range(count):
        states.append(json.dumps(source.state_dict()))
        straight.append(next(source))
    source.close()
    for cut, state in enumerate(states):
        restored = loader(**options)
        restored.load_state_dict(json.loads(state))
        assert json.dumps(restored.state_dict()) == state
        assert_same(take(restored, min(6, count - cut)), straight[cut : cut + 6])


@BOTH
def test_a_used_loader_can_be_set_back(packing: str) -> None:
    source = loader(packing=packing)
    next(source)
    state = source.state_dict()
    straight = [next(source) for _ in range(8)]
    source.load_state_dict(state)
    assert_same(take(source, 8), straight)


def test_the_state_is_of_the_batch_handed_out_not_of_the_one_prepared() -> None:
    source = loader()
    assert source.state_dict()["place"] == 0
    next(source)
    before = source.state_dict()
    source._prepared.result()  # the next batch lies ready
    assert source.state_dict() == before
    next(source)
    assert source.state_dict() != before
    source.close()


def test_the_place_does_not_depend_on_the_rows_of_a_batch() -> None:
    source = loader(rows=3)
    next(source), next(source)
    wider = loader(rows=2)
    wider.load_state_dict(source.state_dict())
    source.close()
    assert torch.equal(
        torch.cat([batch.tokens for batch in take(wider, 3)]),
        torch.cat([b.tokens for b in take(loader(rows=6), 2)])[6:],
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 32}, "another --training.sequence-length: 16 there, 32 here"),
        ({"packing": "best_fit"}, "another --data.packing: 'stream' there, 'best_fit' here"),
        ({"seed": 4}, "another --seed: 3 there, 4 here"),
        ({"world": 2}, "another number of data-parallel ranks: 1 there, 2 here"),
        ({"rank": 1, "world": 2}, "another data-parallel rank: 0 there, 1 here"),
    ],
)
def test_a_state_of_another_loader_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(**options).load_state_dict(loader().state_dict())


def test_a_state_of_other_documents_or_another_tokenizer_is_refused() -> None:
    state = loader().state_dict()
    fewer = Documents.from_texts(TEXTS[1:])
    with pytest.raises(ValueError, match="another number of training documents: 11 there, 10 here"):
        Loader(fewer, TOKENIZER, seed=3, **SIZES).load_state_dict(state)
    edited = Documents.from_texts([*TEXTS[:-1], TEXTS[-1] + "!"])
    with pytest.raises(ValueError, match="another digest of the training documents' lengths"):
        Loader(edited, TOKENIZER, seed=3, **SIZES).load_state_dict(state)
    merging = train_tokenizer(DOCUMENTS, 260)
    with pytest.raises(ValueError, match="another digest of the tokenizer"):
        Loader(DOCUMENTS, merging, seed=3, **SIZES).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 1}, "at least 2 .*got 1"),
        ({"rows": 0}, "at least 1 row, got rows=0"),
        ({"packing": "wrapped"}, "one of stream, best_fit, got 'wrapped'"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"rank": 2, "world": 2}, "under world=2, got 2"),
        ({"world": 12}, "11 training documents cannot be shared among 12"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(**options)


class Torn(list):
    """Texts of which one cannot be read."""

    def __getitem__(self, index):
        if index == 4:
            raise OSError("disk gone")
        return super().__getitem__(index)


def test_an_error_in_the_background_reaches_the_caller_and_stays() -> None:
    torn = Documents(texts=Torn(TEXTS), order=DOCUMENTS.order, lengths=DOCUMENTS.lengths)
    source, whole, got = Loader(torn, TOKENIZER, seed=3, **SIZES), loader(), []
    with pytest.raises(OSError, match="disk gone"):
        for batch in source:
            got.append(batch)
    with pytest.raises(OSError, match="disk gone"):
        next(source)
    assert 1 <= len(got) < 12
    assert_same(got, take(whole, len(got)))
    resumed = loader()
    resumed.load_state_dict(source.state_dict())
    assert_same(take(resumed, 3), take(loader(), len(got) + 3)[-3:])
    source.close()


def test_a_loader_left_open_lets_the_process_end() -> None:
    program = """
from sightline.data import *
documents = Documents.from_texts(["some text", "and more"])
loader = Loader(documents, train_tokenizer(documents, 258), rows=1, sequence_length=8)
print(next(loader).fill())
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (3, "1.0", "")


def test_validation_is_the_same_every_time_and_stops() -> None:
    _, held_out = split_documents(DOCUMENTS, 0.5)
    sizes = {"rows": 5, "rows_per_batch": 2, "sequence_length": 16}
    batches = list(validation_batches(held_out, TOKENIZER, **sizes))
    assert [batch.shape for batch in batches] == [(2, 16), (2, 16), (1, 16)]
    assert_same(batches, list(validation_batches(held_out, TOKENIZER, **sizes)))
    whole = Batch.from_documents([TOKENIZER.encode(text) for text in held_out], 16, pad_token=TOKENIZER.eos_id)
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), whole.tokens[:5])
    everything = list(validation_batches(held_out, TOKENIZER, rows=99, rows_per_batch=99, sequence_length=16))
    assert_same(everything, [whole])
