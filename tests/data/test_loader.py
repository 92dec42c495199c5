"""The loader: an epoch has every token once, and resumed batches are the same on any number of ranks."""

import json
import random
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from sightline.batch import IGNORE, PADDING, Batch
from sightline.data import Documents, Loader, Tokenizer, join_states, split_documents, train_tokenizer
from sightline.data.loader import validation_batches

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
            assert getattr(one, name).dtype == getattr(other, name).dtype
            assert torch.equal(getattr(one, name), getattr(other, name))


def stacked(batches: list[Batch]) -> Batch:
    return Batch(**{name: torch.cat([getattr(batch, name) for batch in batches]) for name in NAMES})


def runs(rows: Batch) -> list[tuple[int, list[int], list[int]]]:
    """Return (first position, tokens, labels) of each run of one document in a row; check padding and positions."""
    found = []
    for tokens, labels, ids, positions in zip(*(getattr(rows, name).tolist() for name in NAMES), strict=True):
        size = sum(number != PADDING for number in ids)
        assert ids[size:] == [PADDING] * (len(ids) - size), "only the end of a row is padding"
        assert tokens[size:] == [TOKENIZER.eos_id] * (len(ids) - size)
        assert labels[size:] == [IGNORE] * (len(ids) - size) and not any(positions[size:])
        if size == 0:
            continue
        starts = [index for index in range(size) if index == 0 or ids[index] != ids[index - 1]]
        assert [ids[start] for start in starts] == list(range(len(starts))), "documents of a row are numbered from 0"
        for first, stop in zip(starts, [*starts[1:], size], strict=True):
            assert positions[first:stop] == list(range(positions[first], positions[first] + stop - first))
            found.append((positions[first], tokens[first:stop], labels[first:stop]))
    return found


def check_epochs(rows: Batch, documents: list[list[int]], epochs: int) -> None:
    """Check that the rows have each token of each document, with its label, `epochs` times."""
    expected = Counter(
        (index, token, label)
        for ids in documents
        for index, (token, label) in enumerate(zip(ids, [*ids[1:], IGNORE], strict=True))
    )
    actual = Counter(
        (first + index, token, label)
        for first, tokens, labels in runs(rows)
        for index, (token, label) in enumerate(zip(tokens, labels, strict=True))
    )
    assert actual == Counter({item: count * epochs for item, count in expected.items()})


def random_settings(draw: random.Random) -> tuple[Documents, dict]:
    """Return documents of one letter each that differ in their first letters, and options of a loader."""
    lengths = [draw.choice([0, draw.randint(0, 8), draw.randint(0, 90)]) for _ in range(draw.randint(1, 40))]
    texts = [f"{number:03}" + chr(97 + number % 26) * length for number, length in enumerate(lengths)]
    options = {
        "rows": draw.choice([1, 2, 3, 6, 12, 24]),
        "sequence_length": draw.choice([2, 7, 16, 64, 333]),
        "packing": draw.choice(["stream", "best_fit"]),
        "seed": draw.randrange(2**64),
        "epochs": draw.randint(1, 3),
    }
    return Documents.from_texts(texts), options


@pytest.mark.parametrize("case", range(40))
def test_every_epoch_has_each_document_exactly_once(case: int) -> None:
    """On random numbers of ranks, with a resume on another number of ranks at a random step of each epoch."""
    draw = random.Random(case)
    documents, options = random_settings(draw)
    worlds = [world for world in (1, 2, 3, 4, 6) if options["rows"] % world == 0]
    single = Loader(documents, TOKENIZER, **options)
    steps, state, parts = single.steps, single.state_dict(), []
    assert steps is not None
    while state["step"] < steps:
        count, world = draw.randint(1, max(1, steps)), draw.choice(worlds)
        ranks = [Loader(documents, TOKENIZER, **options, rank=rank, world=world) for rank in range(world)]
        for rank in ranks:
            assert rank.load_state_dict(json.loads(json.dumps(state))) is None
        count = min(count, steps - state["step"])
        received = [list(islice(rank, count)) for rank in ranks]
        parts += [stacked(list(step)) for step in zip(*received, strict=True)]
        state = join_states([rank.state_dict() for rank in ranks])
        assert [rank.state_dict() for rank in ranks] == [state] * world
        for rank in ranks:
            rank.close()
    assert_same(parts, take(single, steps))
    rows = stacked(parts)
    check_epochs(rows, [TOKENIZER.encode(text) for text in documents], options["epochs"])
    per_epoch = single.rows_per_epoch
    for epoch in range(options["epochs"]):
        check_epochs(rows[epoch * per_epoch :][:per_epoch], [TOKENIZER.encode(text) for text in documents], 1)
    assert (rows.document_ids[options["epochs"] * per_epoch :] == PADDING).all()
    assert rows.shape[0] == -(-options["epochs"] * per_epoch // options["rows"]) * options["rows"]


@BOTH
def test_epochs_have_different_orders(packing: str) -> None:
    source = loader(rows=1, packing=packing)
    per_epoch = source.rows_per_epoch
    rows = stacked(take(source, 4 * per_epoch))
    epochs = [rows[epoch * per_epoch :][:per_epoch] for epoch in range(4)]
    assert len({json.dumps(epoch.tokens.tolist()) for epoch in epochs}) == 4
    assert len({json.dumps(sorted(epoch.tokens.tolist())) for epoch in epochs}) == 1, "the rows are the same"


def test_rows_of_a_long_document_are_spread_over_the_epoch() -> None:
    long = Documents.from_texts(["x" * 4000, *["y" * 38] * 100])
    source = Loader(long, TOKENIZER, rows=1, sequence_length=40)
    count = source.rows_per_epoch
    has_x = [bool((batch.tokens == TOKENIZER.encode("x")[1]).any()) for batch in take(source, count)]
    assert max(sum(has_x[first : first + 20]) for first in range(0, count, 20)) <= 17 < sum(has_x)


def test_seed_determines_order() -> None:
    assert_same(take(loader(), 5), take(loader(), 5))
    assert not torch.equal(stacked(take(loader(seed=4), 5)).tokens, stacked(take(loader(seed=3), 5)).tokens)


@BOTH
def test_rows_per_step_do_not_change_the_rows(packing: str) -> None:
    expected = stacked(take(loader(rows=1, packing=packing), 60))
    for rows in (2, 3, 5, 12):
        assert_same([stacked(take(loader(rows=rows, packing=packing), 60 // rows))], [expected])


def test_stream_rows_equal_batch_from_documents() -> None:
    """The reference packs the documents in the order in which the plan concatenates them."""
    source = loader(rows=1)
    order = source._plan.order(np.arange(len(TEXTS))).tolist()
    expected = Batch.from_documents(
        [TOKENIZER.encode(TEXTS[document]) for document in order], 16, pad_token=TOKENIZER.eos_id
    )
    assert expected.shape[0] == source.rows_per_epoch
    plan_rows = np.arange(source.rows_per_epoch)
    assert_same([source.build(plan_rows, plan_rows)], [expected])


@BOTH
def test_steps_and_epochs(packing: str) -> None:
    source = loader(packing=packing, rows=4, epochs=2)
    rows, steps = source.rows_per_epoch, -(-2 * source.rows_per_epoch // 4)
    epochs = []
    for _ in range(steps + 1):
        assert source.steps == steps
        next(source)
        epochs.append(source.epoch)
    source.close()
    assert epochs[:-2] == pytest.approx([4 * (step + 1) / rows for step in range(steps - 1)])
    assert epochs[-2:] == [2.0, 2.0], "padding is no part of an epoch"
    endless = loader(packing=packing)
    assert endless.steps is None
    take(endless, 30)
    assert endless.epoch == pytest.approx(60 / endless.rows_per_epoch)


@BOTH
@pytest.mark.parametrize("rows", [1, 4, 5, 60])
def test_more_epochs_after_the_last_one_are_complete(packing: str, rows: int) -> None:
    """The padding of the last step does not take rows from the next epoch."""
    options = {"packing": packing, "rows": rows}
    source = loader(epochs=1, **options)
    assert source.steps is not None
    first = take(source, source.steps)
    longer = loader(epochs=3, **options)
    longer.load_state_dict(source.state_dict())
    assert longer.steps is not None and longer.steps > source.steps
    second = take(longer, longer.steps - source.steps)
    assert longer.epoch == 3.0
    check_epochs(stacked(first), [TOKENIZER.encode(text) for text in TEXTS], 1)
    check_epochs(stacked(second), [TOKENIZER.encode(text) for text in TEXTS], 2)
    fewer = loader(epochs=2, **options)
    fewer.load_state_dict(longer.state_dict())
    assert fewer.steps is not None and fewer.steps <= longer.state_dict()["step"]
    assert stacked(take(fewer, 1)).fill() == 0.0


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
    assert source.state_dict() == {**before, "step": 2, "row": 4}
    source.close()


def test_state_is_the_step_and_the_identity() -> None:
    source = loader(rows=6)
    take(source, 20)
    state = source.state_dict()
    assert state == {"version": 2, "identity": source.identity, "step": 20, "row": 120}
    assert len(json.dumps(state)) < 400


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
    reordered = [*TEXTS[:4], TEXTS[5], TEXTS[4], *TEXTS[6:]]  # two documents of equal length
    for texts in (reordered, [*TEXTS[:-1], TEXTS[-1][:-1] + "!"], [*TEXTS[:-1], TEXTS[-1] + "!"]):
        with pytest.raises(ValueError, match="another digest of the training documents"):
            Loader(Documents.from_texts(texts), TOKENIZER, seed=3, **SIZES).load_state_dict(state)
    merging = train_tokenizer(DOCUMENTS, 260)
    with pytest.raises(ValueError, match="another digest of the tokenizer"):
        Loader(DOCUMENTS, merging, seed=3, **SIZES).load_state_dict(state)


def test_state_of_a_later_version_raises() -> None:
    with pytest.raises(ValueError, match="has version 3, but this version of Sightline reads versions up to 2"):
        loader().load_state_dict({**loader().state_dict(), "version": 3})


def test_state_of_an_older_version_continues_at_its_step_with_a_warning() -> None:
    old = {
        "identity": {"documents": 11, "lengths": "0123", "tokenizer": TOKENIZER.fingerprint, "packing": "stream",
                     "sequence_length": 16, "rows": 2, "seed": 3},
        "step": 7,
        "shards": {"0": {"epoch": 1, "next_document": 2, "waiting": [[4, 8]]}},
    }  # fmt: skip
    source = loader()
    warning = source.load_state_dict(json.loads(json.dumps(old)))
    assert warning is not None and "older version" in warning and "repeated or missed" in warning
    assert_same(take(source, 3), take(loader(), 10)[7:])
    assert source.state_dict()["version"] == 2 and source.state_dict()["step"] == 10
    with pytest.raises(ValueError, match="another --seed: got 4, expected 3"):
        loader(seed=4).load_state_dict(old)


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


def test_tokens_are_kept_in_the_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = take(loader(cache_dir=tmp_path / "cache"), 5)
    assert [path.name.split("-")[0] for path in (tmp_path / "cache").iterdir()] == ["tokens"]
    monkeypatch.setattr(Tokenizer, "encode_all", None)  # is not called again
    assert_same(take(loader(cache_dir=tmp_path / "cache"), 5), expected)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_same(take(loader(cache_dir=Path("~/cache")), 5), expected)


def test_error_in_background_thread_is_raised_repeatedly() -> None:
    source, received = loader(), []
    original = source._plan.row

    def unreadable(row: int):
        if row == 3:
            raise OSError("disk gone")
        return original(row)

    source._plan.row = unreadable  # type: ignore[method-assign]
    with pytest.raises(OSError, match="disk gone"):
        for batch in source:
            received.append(batch)
    with pytest.raises(OSError, match="disk gone"):
        next(source)
    assert len(received) < source.rows_per_epoch
    resumed = loader()
    resumed.load_state_dict(source.state_dict())
    assert_same([*received, *take(resumed, 3)], take(loader(), len(received) + 3))
    source.close()


def test_open_loader_does_not_block_exit() -> None:
    program = """
from sightline.data import *
documents = Documents.from_texts(["some text", "and more"])
loader = Loader(documents, train_tokenizer(documents, 258), rows=1, sequence_length=8)
print(next(loader).shape)
raise SystemExit(3)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (3, "(1, 8)", "")


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


def test_validation_reads_no_more_documents_than_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    encode = TOKENIZER.encode
    monkeypatch.setattr(TOKENIZER, "encode", lambda text: (texts.append(text), encode(text))[1])
    list(validation_batches(DOCUMENTS, TOKENIZER, rows=1, rows_per_batch=1, sequence_length=16))
    assert texts == TEXTS[:2]


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
