"""Packers against a brute-force account of what a row must hold.

Every token of these documents is a number that names its document and its place in it, so that a row can be checked
token by token without knowing how it came about.
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
    return [1000 * (number + 1) + place for place in range(length)]


def pieces(lengths: list[int]) -> Iterator[Piece]:
    return (Piece(number, numbered(number, length)) for number, length in enumerate(lengths))


def pack(packer: type, lengths: list[int], length: int) -> list[Row]:
    row_of, documents = packer(length, PAD), pieces(lengths)
    rows = list(iter(lambda: row_of.next_row(documents), None))
    assert row_of.waiting == []
    return rows


def check_rows(rows: list[Row], lengths: list[int], length: int) -> list[list[int]]:
    """Check every token's label, position and document id; return the tokens of each run, in order of the rows."""
    runs: list[list[int]] = []
    for row in rows:
        assert [len(part) for part in row] == [length] * 4
        previous = PADDING
        for slot, (token, label, document_id, position) in enumerate(zip(*row, strict=True)):
            if token == PAD:
                assert (label, document_id, position) == (IGNORE, PADDING, 0)
                assert all(later == PAD for later in row[0][slot:]), "padding stands at the end of a row only"
                break
            number, place = token // 1000 - 1, token % 1000
            assert position == place
            assert label == (token + 1 if place + 1 < lengths[number] else IGNORE)
            if document_id == previous:
                assert token == runs[-1][-1] + 1, "a document's tokens stand side by side"
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
def test_stream_is_the_documents_end_to_end(lengths: list[int], length: int) -> None:
    rows = pack(Stream, lengths, length)
    runs = check_rows(rows, lengths, length)
    assert [token for run in runs for token in run] == [
        token for number, count in enumerate(lengths) for token in numbered(number, count)
    ]
    assert len(rows) == -(-sum(lengths) // length), "no padding but in the last row"


@given(LENGTHS, st.integers(2, 30))
def test_stream_packs_as_batch_from_documents(lengths: list[int], length: int) -> None:
    ours = Batch.from_rows(pack(Stream, lengths, length))
    theirs = Batch.from_documents([numbered(*facts) for facts in enumerate(lengths)], length)
    for name in ("tokens", "labels", "document_ids", "positions"):
        assert getattr(ours, name).equal(getattr(theirs, name))


@given(LENGTHS, st.integers(2, 30), st.integers(1, 6))
def test_best_fit_cuts_only_what_is_longer_than_a_row(lengths: list[int], length: int, buffer: int) -> None:
    with mock.patch.object(packing, "BUFFER", buffer):
        runs = check_rows(pack(BestFit, lengths, length), lengths, length)
    whole = [numbered(*facts) for facts in enumerate(lengths)]
    assert sorted(runs) == sorted(run[at : at + length] for run in whole for at in range(0, len(run), length))


@given(LENGTHS, st.integers(2, 30), st.integers(1, 6))
def test_best_fit_places_the_longest_that_fits(lengths: list[int], length: int, buffer: int) -> None:
    """The same choice, made with a list of sizes and nothing else."""
    with mock.patch.object(packing, "BUFFER", buffer):
        runs = check_rows(pack(BestFit, lengths, length), lengths, length)
    coming, waiting, expected, room = list(enumerate(lengths)), [], [], length
    while coming or waiting:
        while len(waiting) < buffer and coming:
            number, count = coming.pop(0)
            waiting += [numbered(number, count)[at : at + length] for at in range(0, count, length)]
        fits = [piece for piece in waiting if len(piece) <= room]
        if fits:
            longest = max(len(piece) for piece in fits)
            chosen = next(piece for piece in fits if len(piece) == longest)
            waiting.remove(chosen)
            expected.append(chosen)
            room -= longest
        else:
            room = length
    assert runs == expected


def test_stream_by_hand() -> None:
    """A document longer than two rows, and one of a single token."""
    first, second, third = pack(Stream, [2, 7, 1], 4)
    assert first == ([1000, 1001, 2000, 2001], [1001, IGNORE, 2001, 2002], [0, 0, 1, 1], [0, 1, 0, 1])
    assert second == ([2002, 2003, 2004, 2005], [2003, 2004, 2005, 2006], [0, 0, 0, 0], [2, 3, 4, 5])
    assert third == ([2006, 3000, 0, 0], [IGNORE, IGNORE, IGNORE, IGNORE], [0, 1, -1, -1], [6, 0, 0, 0])


def test_best_fit_by_hand() -> None:
    """Sizes 5 3 4 8 1 20 in rows of 8: 20 is cut into 8, 8 and 4, and every gap but the last is filled."""
    rows = pack(BestFit, [5, 3, 4, 8, 1, 20], 8)
    assert [[token for token in row[0] if token] for row in rows] == [
        numbered(3, 8),
        numbered(5, 20)[:8],
        numbered(5, 20)[8:16],
        numbered(0, 5) + numbered(1, 3),
        numbered(2, 4) + numbered(5, 20)[16:],
        numbered(4, 1),
    ]
    assert rows[1][1][-1] == 6008, "the last label of a cut piece is the document's next token"
    assert rows[2][3] == list(range(8, 16))


@pytest.mark.parametrize("packer", [Stream, BestFit])
def test_a_packer_goes_on_from_its_waiting_pieces(packer: type) -> None:
    lengths, length = [5, 30, 3, 1, 12, 7, 7, 2], 8
    straight = pack(packer, lengths, length)
    for cut in range(len(straight) + 1):
        first, documents = packer(length, PAD), pieces(lengths)
        rows = [first.next_row(documents) for _ in range(cut)]
        second = packer(length, PAD, first.waiting)
        rows += list(iter(lambda: second.next_row(documents), None))  # noqa: B023
        assert rows == straight
