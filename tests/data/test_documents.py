"""Sequences of texts, and the split into training and validation."""

import numpy as np
import pytest

from sightline.data import Documents, split_documents


def documents(count: int) -> Documents:
    return Documents.from_texts([f"text {number}" for number in range(count)])


def test_selection_is_a_sequence() -> None:
    chosen = documents(10).select(np.array([7, 2, 4])).select(np.array([2, 0]))
    assert list(chosen) == ["text 4", "text 7"]
    assert (len(chosen), chosen.characters, chosen[-1]) == (2, 12, "text 7")
    with pytest.raises(IndexError):
        chosen[2]


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
