"""Packers against brute-force checks of their rows.

Each token of these documents encodes its document and its position, so that rows can be checked token by token,
independently of the packer.
"""

from collections.abc import Iterator
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.batch import IGNORE, PADDING, Batch, Row
from sightline.data import BestFit, Piece, Stream, packing

PAD = 0
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def numbered(number: int, length: int) -> list[int]:
    return [1000 * (number + 1) + position for position in range(length)]


def pieces(lengths: list[int]) -> Iterator[Piece]:
    return (Piece(number, numbered(number, length)) for number, length in enumerate(lengths))


def pack(packer: type, lengths: list[int], length: int) -> list[Row]:
    instance, documents = packer(length, PAD), pieces(lengths)
    rows = list(iter(lambda: instance.next_row(documents), None))
    assert instance.waiting == []
    return rows


def check_rows(rows: list[Row], lengths: list[int], length: int) -> list[list[int]]:
    """Check label, position and document id of every token; return the tokens of each run, in the order of the rows."""
    runs: list[list[int]] = []
    for row in rows:
        assert [len(part) for part in row] == [length] * 4
        previous = PADDING
        for index, (token, label, document_id, position) in enumerate(zip(*row, strict=True)):
            if token == PAD:
                assert (label, document_id, position) == (IGNORE, PADDING, 0)
                assert all(later == PAD for later in row[0][index:]), "only the end of a row is padding"
                break
            number = token // 1000 - 1
            assert position == token % 1000
            assert label == (token + 1 if position + 1 < lengths[number] else IGNORE)
            if document_id == previous:
                assert token == runs[-1][-1] + 1, "the tokens of a document are contiguous"
                runs[-1].append(token)
            else:
                assert document_id == previous + 1, "documents of a row are numbered from 0"
                runs.append([token])
            previous = document_id
    assert sorted(token for run in runs for token in run) == sorted(
        token for number, count in enumerate(lengths) for token in numbered(number, count)
    )
    return runs


@given(LENGTHS, st.integers(2, 30))
def test_stream_concatenates_documents(lengths: list[int], length: int) -> None:
    rows = pack(Stream, lengths, length)
    runs = check_rows(rows, lengths, length)
    assert [token for run in runs for token in run] == [
        token for number, count in enumerate(lengths) for token in numbered(number, count)
    ]
    assert len(rows) == -(-sum(lengths) // length), "only the last row is padded"


@given(LENGTHS, st.integers(2, 30))
def test_stream_equals_batch_from_documents(lengths: list[int], length: int) -> None:
    packed = Batch.from_rows(pack(Stream, lengths, length))
    expected = Batch.from_documents([numbered(*item) for item in enumerate(lengths)], length)
    for name in ("tokens", "labels", "document_ids", "positions"):
        assert getattr(packed, name).equal(getattr(expected, name))


@given(LENGTHS, st.integers(2, 30), st.integers(1, 6))
def test_best_fit_splits_only_documents_longer_than_a_row(lengths: list[int], length: int, buffer: int) -> None:
    with mock.patch.object(packing, "BUFFER", buffer):
        runs = check_rows(pack(BestFit, lengths, length), lengths, length)
    documents = [numbered(*item) for item in enumerate(lengths)]
    assert sorted(runs) == sorted(
        tokens[start : start + length] for tokens in documents for start in range(0, len(tokens), length)
    )


@given(LENGTHS, st.integers(2, 30), st.integers(1, 6))
def test_best_fit_packs_longest_piece_that_fits(lengths: list[int], length: int, buffer: int) -> None:
    """Compare with a simple implementation on lists."""
    with mock.patch.object(packing, "BUFFER", buffer):
        runs = check_rows(pack(BestFit, lengths, length), lengths, length)
    remaining, waiting, expected, free = list(enumerate(lengths)), [], [], length
    while remaining or waiting:
        while len(waiting) < buffer and remaining:
            number, count = remaining.pop(0)
            waiting += [numbered(number, count)[start : start + length] for start in range(0, count, length)]
        fits = [piece for piece in waiting if len(piece) <= free]
        if fits:
            longest = max(len(piece) for piece in fits)
            chosen = next(piece for piece in fits if len(piece) == longest)
            waiting.remove(chosen)
            expected.append(chosen)
            free -= longest
        else:
            free = length
    assert runs == expected


def test_stream_example() -> None:
    """Documents: one longer than a row, and one of a single token."""
    first, second, third = pack(Stream, [2, 7, 1], 4)
    assert first == ([1000, 1001, 2000, 2001], [1001, IGNORE, 2001, 2002], [0, 0, 1, 1], [0, 1, 0, 1])
    assert second == ([2002, 2003, 2004, 2005], [2003, 2004, 2005, 2006], [0, 0, 0, 0], [2, 3, 4, 5])
    assert third == ([2006, 3000, 0, 0], [IGNORE, IGNORE, IGNORE, IGNORE], [0, 1, -1, -1], [6, 0, 0, 0])


def test_best_fit_example() -> None:
    """Only the document of 20 tokens is split, into 8, 8 and 4, and only the last row has padding."""
    rows = pack(BestFit, [5, 3, 4, 8, 1, 20], 8)
    assert [[token for token in row[0] if token] for row in rows] == [
        numbered(3, 8),
        numbered(5, 20)[:8],
        numbered(5, 20)[8:16],
        numbered(0, 5) + numbered(1, 3),
        numbered(2, 4) + numbered(5, 20)[16:],
        numbered(4, 1),
    ]
    assert rows[1][1][-1] == 6008, "the last label of a piece is the next token of the document"
    assert rows[2][3] == list(range(8, 16))


@pytest.mark.parametrize("packer", [Stream, BestFit])
def test_packer_resumes_from_waiting_pieces(packer: type) -> None:
    lengths, length = [5, 30, 3, 1, 12, 7, 7, 2], 8
    expected = pack(packer, lengths, length)
    for num_rows in range(len(expected) + 1):
        first, documents = packer(length, PAD), pieces(lengths)
        rows = [first.next_row(documents) for _ in range(num_rows)]
        second = packer(length, PAD, first.waiting)
        rows += list(iter(lambda: second.next_row(documents), None))  # noqa: B023
        assert rows == expected
