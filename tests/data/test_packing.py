"""Packing plans against brute force: every token of every document once, in rows of the given length."""

from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.data import packing
from sightline.data.array_cache import cached_arrays, concatenate
from sightline.data.packing import PACKINGS, Plan, best_fit_decreasing, make_plan
from sightline.data.permutation import Permutation
from sightline.data.tokens import TokenizedDocuments

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
Runs = list[list[tuple[int, int, int]]]


def tokenized(lengths: list[int]) -> TokenizedDocuments:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenizedDocuments(name="test", tokens=np.arange(offsets[-1], dtype=np.uint32), offsets=offsets)


def plan_of(lengths: list[int], packing: str, length: int, seed: int = 0, cache_dir: Path | None = None) -> Plan:
    return make_plan(
        tokenized(lengths), packing=packing, sequence_length=length, seed=seed, cache_dir=cache_dir or Path("nowhere")
    )


def rows_of(plan: Plan) -> Runs:
    """Return (document, start, stop) of the pieces of each row."""
    return [list(zip(*(part.tolist() for part in plan.row(row)), strict=True)) for row in range(plan.num_rows)]


def check_complete(rows: Runs, lengths: list[int], length: int) -> None:
    """Check that the pieces are every token of every document exactly once, and fit into their rows."""
    assert all(row and sum(stop - start for _, start, stop in row) <= length for row in rows)
    found = sorted((document, index) for row in rows for document, *piece in row for index in range(*piece))
    assert found == [(document, index) for document, count in enumerate(lengths) for index in range(count)]


@given(LENGTHS, st.integers(2, 30), st.integers(0, 99))
def test_stream_concatenates_the_shuffled_documents(lengths: list[int], length: int, seed: int) -> None:
    with mock.patch.object(packing, "CHUNK", 7):
        rows = rows_of(plan_of(lengths, "stream", length, seed))
    check_complete(rows, lengths, length)
    order = Permutation(len(lengths), seed, 0, packing.DOCUMENT_ORDER)(np.arange(len(lengths))).tolist()
    tokens = [(document, index) for document in order for index in range(lengths[document])]
    expected = [tokens[first : first + length] for first in range(0, len(tokens), length)]
    assert [[(document, index) for document, *piece in row for index in range(*piece)] for row in rows] == expected


@given(LENGTHS, st.integers(2, 30), st.integers(0, 99), st.integers(1, 9))
def test_best_fit_splits_only_documents_longer_than_a_row(
    lengths: list[int], length: int, seed: int, window: int
) -> None:
    with mock.patch.multiple(packing, WINDOW_DOCUMENTS=window, WINDOW_ROWS=1):
        rows = rows_of(plan_of(lengths, "best_fit", length, seed))
    check_complete(rows, lengths, length)
    assert sorted(piece for row in rows for piece in row) == [
        (document, start, min(start + length, count))
        for document, count in enumerate(lengths)
        for start in range(0, count, length)
    ]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_best_fit_decreasing_equals_a_simple_implementation(lengths: list[int]) -> None:
    """The longest piece first, into the row with the least room that it fits into, the last one among equals."""
    free: list[int] = []
    expected = [0] * len(lengths)
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        rooms = [room for room in free if room >= lengths[piece]]
        if not rooms:
            free.append(20)
            rooms = [20]
        row = max(row for row, room in enumerate(free) if room == min(rooms))
        expected[piece] = row
        free[row] -= lengths[piece]
    actual = best_fit_decreasing(np.array(lengths), 20)
    filled = [sorted(np.bincount(rows, weights=lengths).tolist()) for rows in (actual, np.array(expected))]
    assert filled[0] == filled[1]


def test_best_fit_fills_rows_of_many_documents() -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.2, 20_000).astype(int) + 2
    for length in (1024, 65_536):
        rows = plan_of(lengths.tolist(), "best_fit", length).num_rows
        assert lengths.sum() / (rows * length) > 0.99


def test_another_seed_is_another_plan() -> None:
    lengths = list(range(1, 40))
    for name in PACKINGS:
        plans = [rows_of(plan_of(lengths, name, 16, seed)) for seed in (0, 0, 1)]
        assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("name", PACKINGS)
def test_a_large_plan_is_mapped_from_the_cache(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = list(range(1, 60))
    expected = rows_of(plan_of(lengths, name, 16, cache_dir=tmp_path))
    assert not any(tmp_path.iterdir()), "a small plan is made in memory"
    monkeypatch.setattr(packing, "CACHED_DOCUMENTS", 10)
    assert rows_of(plan_of(lengths, name, 16, cache_dir=tmp_path)) == expected
    monkeypatch.setattr(PACKINGS[name], "build", None)  # is not called again
    mapped = plan_of(lengths, name, 16, cache_dir=tmp_path)
    assert rows_of(mapped) == expected
    array = mapped.starts  # type: ignore[attr-defined]
    assert isinstance(array.base, np.memmap)
    with pytest.raises(TypeError):
        plan_of(lengths, name, 17, cache_dir=tmp_path)


def test_parts_are_concatenated_as_in_the_cache(tmp_path: Path) -> None:
    def parts():
        yield {"a": np.arange(3), "b": np.zeros(0, np.uint16)}
        yield {"b": np.arange(5, dtype=np.uint16)}

    for arrays in (concatenate(parts()), cached_arrays(tmp_path, "name", parts)):
        assert arrays["a"].tolist() == [0, 1, 2] and arrays["b"].tolist() == [0, 1, 2, 3, 4]
        assert arrays["b"].dtype == np.uint16
