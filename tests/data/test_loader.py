"""The loader: every document once per epoch, and identical batches after resuming at any step."""

import json
import subprocess
import sys
from itertools import islice

import pytest
import torch

from sightline.batch import IGNORE, PADDING, Batch
from sightline.data import Documents, Loader, join_states, split_documents, train_tokenizer, validation_batches

NAMES = ("tokens", "labels", "document_ids", "positions")
LENGTHS = [3, 11, 1, 60, 7, 7, 2, 25, 14, 1, 9]
TEXTS = [chr(ord("a") + number) * length for number, length in enumerate(LENGTHS)]
DOCUMENTS = Documents.from_texts(TEXTS)
TOKENIZER = train_tokenizer(DOCUMENTS, 258)  # no merges: one token per letter
SIZES = {"rows": 2, "sequence_length": 16}
BOTH = pytest.mark.parametrize("packing", ["stream", "best_fit"])


def loader(**options) -> Loader:
    return Loader(DOCUMENTS, TOKENIZER, **{**SIZES, "seed": 3, **options})


def take(source: Loader, count: int) -> list[Batch]:
    batches = list(islice(source, count))
    source.close()
    return batches


def assert_same(actual: list[Batch], expected: list[Batch]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        for name in NAMES:
            assert torch.equal(getattr(one, name), getattr(other, name))


def stacked(batches: list[Batch]) -> Batch:
    return Batch(**{name: torch.cat([getattr(batch, name) for batch in batches]) for name in NAMES})


def rows_of_shards(batches: list[Batch], shards: int = 8) -> list[Batch]:
    """Return the rows of each shard, from batches that start at step 0."""
    rows = stacked(batches)
    return [rows[shard::shards] for shard in range(shards)]


def texts(rows: Batch) -> list[str]:
    """Return the text of each document in consecutive rows of a shard (the last one may be incomplete)."""
    tokens = rows.tokens[rows.document_ids != PADDING]
    starts = (tokens == TOKENIZER.bos_id).nonzero().flatten().tolist()
    return [TOKENIZER.decode(part.tolist()) for part in torch.tensor_split(tokens, starts)[1:]]


def test_shard_packs_its_documents_in_order() -> None:
    batches = take(loader(), 40)
    assert {batch.shape for batch in batches} == {(2, 16)}
    assert {batch.fill() for batch in batches} == {1.0}
    for shard in rows_of_shards(batches):
        order = texts(shard)[:-1]
        packed = Batch.from_documents([TOKENIZER.encode(text) for text in order], 16)
        rows = packed.shape[0] - 1  # the reference pads its last row
        assert rows >= 5
        assert_same([shard[:rows]], [packed[:rows]])


@pytest.mark.parametrize(("rows", "shards"), [(1, 8), (2, 8), (3, 9), (8, 8), (11, 11)])
def test_every_epoch_reads_each_document_once_in_a_new_order(rows: int, shards: int) -> None:
    orders = [texts(shard) for shard in rows_of_shards(take(loader(rows=rows), 50 * shards // rows), shards)]
    sizes = [len(range(shard, len(TEXTS), shards)) for shard in range(shards)]
    epochs = [
        [text for order, size in zip(orders, sizes, strict=True) for text in order[epoch * size :][:size]]
        for epoch in range(4)
    ]
    assert all(sorted(epoch) == sorted(TEXTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_seed_determines_order() -> None:
    assert_same(take(loader(), 5), take(loader(), 5))
    assert texts(stacked(take(loader(seed=4), 20))) != texts(stacked(take(loader(seed=3), 20)))


@BOTH
def test_rows_do_not_depend_on_the_number_of_ranks(packing: str) -> None:
    options = {"rows": 6, "packing": packing}
    expected = take(loader(**options), 12)
    for world in (2, 3, 6):
        ranks = [take(loader(**options, rank=rank, world=world), 12) for rank in range(world)]
        assert_same([stacked(list(parts)) for parts in zip(*ranks, strict=True)], expected)


def test_rank_tokenizes_only_its_shards() -> None:
    read = []

    class Recorded(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    for rank in range(2):
        documents = Documents(texts=Recorded(TEXTS), order=DOCUMENTS.order, lengths=DOCUMENTS.lengths)
        take(Loader(documents, TOKENIZER, rows=8, sequence_length=2, seed=3, rank=rank, world=2), 1)
    assert len(read) == len(set(read)) == 8


def test_row_continues_the_previous_row_of_its_shard() -> None:
    """With 8 shards and 2 rows per step, the next row of a shard comes 4 steps later."""
    positions = [batch.positions for batch in take(loader(), 24)]
    continued = 0
    for before, after in zip(positions, positions[4:], strict=False):
        for last, first in zip(before[:, -1].tolist(), after[:, 0].tolist(), strict=True):
            assert first in (0, last + 1)
            continued += first > 0
    assert continued > 20


@pytest.mark.parametrize(("count", "packing"), [(1, "stream"), (3, "stream"), (1, "best_fit")])
def test_more_shards_than_documents_read_parts_of_documents(count: int, packing: str) -> None:
    """The parts make up the full document, and keep its positions."""
    few = Documents.from_texts([chr(ord("a") + number) * (50 - number) for number in range(count)])
    shards = rows_of_shards(take(Loader(few, TOKENIZER, rows=8, sequence_length=64, packing=packing), 1))
    parts = {}
    for shard in shards:
        first = shard.document_ids[0] == 0
        parts.setdefault(shard.tokens[0][first][1].item(), []).append((shard.positions[0][first].tolist(), shard))
    assert len(parts) == count
    for number, received in enumerate(parts[letter] for letter in sorted(parts)):
        length = len(TOKENIZER.encode(few[number]))
        assert sorted(position for positions, _ in received for position in positions) == list(range(length))
        assert max(len(positions) for positions, _ in received) <= length // len(received) + 1


def test_more_shards_than_tokens() -> None:
    """A text with fewer tokens than parts: no part is empty."""
    tiny = Documents.from_texts(["a"])
    batch = take(Loader(tiny, TOKENIZER, rows=8, sequence_length=4), 1)[0]
    assert batch.fill() == 1.0
    assert set(batch.tokens.flatten().tolist()) == set(TOKENIZER.encode("a"))


@BOTH
def test_all_documents_occur_with_both_packings(packing: str) -> None:
    batches = take(loader(packing=packing, sequence_length=64), 300)
    seen = {text for shard in rows_of_shards(batches) for text in texts(shard)}
    assert seen >= set(TEXTS)
    fill = sum(batch.fill() for batch in batches) / 300
    assert fill == 1.0 if packing == "stream" else fill > 0.9


@BOTH
@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 1), (2, 3), (3, 6)])
def test_resumed_batches_are_the_same_on_any_number_of_ranks(packing: str, before: int, after: int) -> None:
    count, options = 24, {"rows": 6, "packing": packing}
    sources = [loader(**options, rank=rank, world=before) for rank in range(before)]
    states, expected = [], []
    for _ in range(count):
        states.append(json.dumps(join_states([source.state_dict() for source in sources])))
        expected.append(stacked([next(source) for source in sources]))
    for source in sources:
        source.close()
    for step in range(0, count, 3):
        resumed = [loader(**options, rank=rank, world=after) for rank in range(after)]
        for source in resumed:
            source.load_state_dict(json.loads(states[step]))
        assert json.dumps(join_states([source.state_dict() for source in resumed])) == states[step]
        batches = [take(source, min(5, count - step)) for source in resumed]
        assert_same([stacked(list(parts)) for parts in zip(*batches, strict=True)], expected[step : step + 5])


@BOTH
def test_loading_a_state_rewinds_a_used_loader(packing: str) -> None:
    source = loader(packing=packing)
    next(source)
    state = source.state_dict()
    expected = [next(source) for _ in range(8)]
    source.load_state_dict(state)
    assert_same(take(source, 8), expected)


def test_state_does_not_include_the_prefetched_batch() -> None:
    source = loader()
    assert source.state_dict()["step"] == 0
    next(source)
    before = source.state_dict()
    source._prepared.result()  # the next batch is ready
    assert source.state_dict() == before
    next(source)
    assert source.state_dict() != before
    source.close()


def test_state_is_small() -> None:
    source = loader(rows=6)
    take(source, 20)
    assert source.state_dict()["step"] == 20
    assert list(source.state_dict()["shards"]) == [str(shard) for shard in range(12)]
    assert len(json.dumps(source.state_dict())) < 1200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequence_length": 32}, "another --training.sequence-length: got 32, expected 16"),
        ({"packing": "best_fit"}, "another --data.packing: got 'best_fit', expected 'stream'"),
        ({"seed": 4}, "another --seed: got 4, expected 3"),
        ({"rows": 4}, "another --training.global-batch-size: got 4, expected 2"),
    ],
)
def test_state_of_another_loader_raises(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(**options).load_state_dict(loader().state_dict())


def test_state_of_other_documents_or_tokenizer_raises() -> None:
    state = loader().state_dict()
    fewer = Documents.from_texts(TEXTS[1:])
    with pytest.raises(ValueError, match="another number of training documents: got 10, expected 11"):
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
        ({"rank": 2, "world": 2}, "less than world=2, got 2"),
        (
            {"rows": 6, "world": 4},
            r"6 rows per step .*not divisible by 4 data-parallel ranks .*that divide them: \[1, 2, 3, 6\]",
        ),
    ],
)
def test_invalid_arguments_raise(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(**options)


def test_no_documents_raise() -> None:
    with pytest.raises(ValueError, match="memory contains no training documents"):
        Loader(Documents.from_texts([]), TOKENIZER, **SIZES)


class Unreadable(list):
    """Texts, one of which cannot be read."""

    def __getitem__(self, index):
        if index == 4:
            raise OSError("disk gone")
        return super().__getitem__(index)


def test_error_in_background_thread_is_raised_repeatedly() -> None:
    unreadable = Documents(texts=Unreadable(TEXTS), order=DOCUMENTS.order, lengths=DOCUMENTS.lengths)
    source, reference, received = Loader(unreadable, TOKENIZER, seed=3, **SIZES), loader(), []
    with pytest.raises(OSError, match="disk gone"):
        for batch in source:
            received.append(batch)
    with pytest.raises(OSError, match="disk gone"):
        next(source)
    assert 1 <= len(received) < 12
    assert_same(received, take(reference, len(received)))
    resumed = loader()
    resumed.load_state_dict(source.state_dict())
    assert_same(take(resumed, 3), take(loader(), len(received) + 3)[-3:])
    source.close()


def test_open_loader_does_not_block_exit() -> None:
    program = """
from sightline.data import *
documents = Documents.from_texts(["some text", "and more"])
loader = Loader(documents, train_tokenizer(documents, 258), rows=1, sequence_length=8)
print(next(loader).fill())
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (3, "1.0", "")


def test_validation_batches_are_finite_and_the_same_every_time() -> None:
    _, held_out = split_documents(DOCUMENTS, 0.5)
    sizes = {"rows": 5, "rows_per_batch": 2, "sequence_length": 16}
    batches = list(validation_batches(held_out, TOKENIZER, **sizes))
    assert [batch.shape for batch in batches] == [(2, 16), (2, 16), (1, 16)]
    assert_same(batches, list(validation_batches(held_out, TOKENIZER, **sizes)))
    expected = Batch.from_documents([TOKENIZER.encode(text) for text in held_out], 16, pad_token=TOKENIZER.eos_id)
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), expected.tokens[:5])
    all_batches = list(validation_batches(held_out, TOKENIZER, rows=99, rows_per_batch=99, sequence_length=16))
    assert_same(all_batches, [expected])


@pytest.mark.parametrize(("rows", "shapes"), [(6, [(2, 16), (1, 16)]), (5, [(2, 16), (1, 16)]), (99, None)])
def test_validation_rows_are_divided_equally(rows: int, shapes: list | None) -> None:
    """With 5 rows, the second rank has two rows, and a row of padding without labels."""
    sizes = {"rows": rows, "rows_per_batch": 2, "sequence_length": 16}
    expected = stacked(list(validation_batches(DOCUMENTS, TOKENIZER, **sizes)))
    ranks = [list(validation_batches(DOCUMENTS, TOKENIZER, **sizes, rank=rank, world=2)) for rank in range(2)]
    assert [batch.shape for batch in ranks[0]] == [batch.shape for batch in ranks[1]]
    assert shapes is None or [batch.shape for batch in ranks[0]] == shapes
    actual = stacked([batch for batches in ranks for batch in batches])
    count = expected.shape[0]
    assert_same([actual[:count]], [expected])
    assert actual.shape[0] == count + count % 2
    assert (actual.document_ids[count:] == PADDING).all() and (actual.labels[count:] == IGNORE).all()
