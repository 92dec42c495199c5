"""Sequences of texts, and the split into training and validation."""

import numpy as np
import pytest

from sightline.data import Documents, split_documents
from sightline.data import documents as documents_module


def documents(count: int) -> Documents:
    return Documents.from_texts([f"text {number}" for number in range(count)])


def test_selection_is_a_sequence() -> None:
    chosen = documents(10).select(np.array([7, 2, 4])).select(np.array([2, 0]))
    assert list(chosen) == ["text 4", "text 7"]
    assert (len(chosen), chosen.characters, chosen[-1]) == (2, 12, "text 7")
    with pytest.raises(IndexError):
        chosen[2]


def test_digest_covers_texts_order_and_lengths() -> None:
    texts = [f"text {number}" for number in range(5000)]
    one = Documents.from_texts(texts)
    assert one.digest == Documents.from_texts(list(texts), source="elsewhere").digest
    others = [
        [text[::-1] for text in texts],
        texts[::-1],
        [*texts[:-1], "text 499", "9"],
        [*texts[:-2], texts[-2] + texts[-1][0], texts[-1][1:]],
        [*texts[:2500], "text 250x", *texts[2501:]],
    ]
    assert len({one.digest, *(Documents.from_texts(other).digest for other in others)}) == 6
    chosen = one.select(np.array([7, 2, 4]))
    assert chosen.digest == Documents.from_texts([texts[7], texts[2], texts[4]]).digest != one.digest
    assert Documents.from_texts([]).digest


def test_digest_of_a_large_source_reads_some_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """All lengths, and evenly spaced documents, which are read many at a time."""
    monkeypatch.setattr(documents_module, "DIGEST_CHARACTERS", 10_000)
    monkeypatch.setattr(documents_module, "DIGEST_DOCUMENTS", 100)
    monkeypatch.setattr(documents_module, "READ_DOCUMENTS", 40)
    read: list[list[int]] = []

    class OnDisk(list):
        def __getitems__(self, rows: list[int]) -> list[str]:
            read.append(rows)
            return [self[row] for row in rows]

    texts = [f"text {number:04}" for number in range(2000)]
    digest = Documents.from_texts(OnDisk(texts)).digest
    assert [len(rows) for rows in read] == [40, 40, 20]
    assert [row for rows in read for row in rows] == list(range(0, 2000, 20))
    edited = [*texts[:-1], texts[-1] + "!"]
    assert Documents.from_texts(edited).digest != digest, "a length changed"
    edited = [*texts[:20], "text 002x", *texts[21:]]
    assert Documents.from_texts(edited).digest != digest


def test_description_lists_three_skipped_names() -> None:
    skipped = {"empty": [f"{number}.txt" for number in range(1200)], "not UTF-8": []}
    described = Documents.from_texts(["abc"] * 2000, source="here", skipped=skipped).describe()
    assert described == "2,000 documents, 6,000 characters from here; skipped 1,200 empty (0.txt, 1.txt, 2.txt, ...)"


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(100, 0.05, 5), (10, 0.01, 1), (2, 0.99, 1), (7, 0.5, 4), (9, 0.0, 0)]
)
def test_fraction_is_held_out(count: int, fraction: float, held_out: int) -> None:
    training, validation = split_documents(documents(count), fraction)
    assert len(validation) == held_out
    assert sorted([*training, *validation]) == sorted(documents(count))
    assert list(training) == [text for text in documents(count) if text in set(training)], "in the source's order"
    again = split_documents(documents(count), fraction)
    assert (list(again[0]), list(again[1])) == (list(training), list(validation))


def test_held_out_documents_are_in_random_order() -> None:
    _, validation = split_documents(documents(1000), 0.1)
    numbers = [int(text.split()[1]) for text in validation]
    assert numbers != sorted(numbers)
    assert sum(number < 500 for number in numbers) in range(30, 71)


def test_splitting_one_document_raises() -> None:
    with pytest.raises(
        ValueError, match=r"needs at least 2 documents, but memory contains 1;.*--data\.validation-fraction 0"
    ):
        split_documents(documents(1), 0.05)
    training, validation = split_documents(documents(1), 0.0)
    assert (len(training), len(validation)) == (1, 0)
