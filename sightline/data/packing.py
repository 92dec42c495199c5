"""Packing plans: which part of which document each row of an epoch holds.

A plan is made once for all documents, in one shuffled order. It depends neither on the number of ranks nor on the rows
of a step. Its arrays have one element per document, piece or row, and are memory-mapped where they are large.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from sightline.data.array_cache import Arrays, cached_arrays, concatenate
from sightline.data.permutation import Permutation
from sightline.data.tokens import TokenizedDocuments

CACHED_DOCUMENTS = 100_000
"""Number of documents from which a plan is kept in the cache directory; smaller ones are made in milliseconds."""
CHUNK = 1 << 20
"""Documents whose lengths are read at a time."""
WINDOW_DOCUMENTS, WINDOW_ROWS = 4096, 512
"""Size of a window of best_fit: at least this many documents, and documents for about this many rows. The last row of a
window is filled in part: 1 row in 512."""
DOCUMENT_ORDER = 1
"""Last number of the key of the documents' order, so that it is unrelated to other permutations with the same seed."""


class Pieces(NamedTuple):
    """Pieces of documents, in the order of a row: the tokens start to stop of each document, int64 [P] each."""

    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray


class Plan(Protocol):
    """The rows of an epoch."""

    num_rows: int

    def row(self, row: int) -> Pieces:
        """Return the pieces of row `row`, from 0 to num_rows - 1."""
        ...


def make_plan(tokens: TokenizedDocuments, *, packing: str, sequence_length: int, seed: int, cache_dir: Path) -> Plan:
    """Return the plan of rows of `sequence_length` tokens, from the cache if there are many documents.

    Raises:
        ValueError: if the cache directory cannot be used.
    """
    order = Permutation(len(tokens), seed, 0, DOCUMENT_ORDER)
    packed = PACKINGS[packing]

    def build() -> Iterator[Arrays]:
        return packed.build(tokens.offsets, order, sequence_length)

    if len(tokens) < CACHED_DOCUMENTS:
        arrays = concatenate(build())
    else:
        arrays = cached_arrays(cache_dir, f"{tokens.name}-{packing}-{sequence_length}-{seed}", build)
    return packed(tokens.offsets, order, sequence_length, arrays)


class Stream:
    """Concatenates the documents and splits them at row boundaries; only the last row of the epoch is padded.

    starts  int64 [N + 1], index of the first token of each document in the concatenation
    """

    def __init__(self, offsets: np.ndarray, order: Permutation, length: int, arrays: Arrays) -> None:
        self.order, self.length, self.starts = order, length, arrays["starts"]
        self.num_rows = -(-int(self.starts[-1]) // length)

    @staticmethod
    def build(offsets: np.ndarray, order: Permutation, length: int) -> Iterator[Arrays]:
        yield {"starts": np.zeros(1, np.int64)}
        total = 0
        for first in range(0, len(offsets) - 1, CHUNK):
            _, lengths = read_lengths(offsets, order, first, CHUNK)
            starts = total + np.cumsum(lengths)
            total = int(starts[-1])
            yield {"starts": starts}

    def row(self, row: int) -> Pieces:
        first, last = row * self.length, min((row + 1) * self.length, int(self.starts[-1]))
        begin = int(np.searchsorted(self.starts, first, side="right")) - 1
        end = int(np.searchsorted(self.starts, last, side="left"))
        starts = self.starts[begin : end + 1]
        return Pieces(
            document=self.order(np.arange(begin, end)),
            start=np.maximum(first - starts[:-1], 0),
            stop=np.minimum(last, starts[1:]) - starts[:-1],
        )


class BestFit:
    """Splits only documents longer than a row, into full rows and a remainder, and pads the rows.

    A window of the shuffled documents is packed by best-fit decreasing: the longest piece first, each into the row with
    the least room that it fits into.

    rows       int64 [R + 1], index of the first piece of each row
    documents  int64 [P], document of each piece
    starts     int64 [P], first token of each piece in its document
    """

    def __init__(self, offsets: np.ndarray, order: Permutation, length: int, arrays: Arrays) -> None:
        self.offsets, self.length = offsets, length
        self.rows, self.documents, self.starts = (arrays[name] for name in ("rows", "documents", "starts"))
        self.num_rows = len(self.rows) - 1

    @staticmethod
    def build(offsets: np.ndarray, order: Permutation, length: int) -> Iterator[Arrays]:
        empty = np.zeros(0, np.int64)
        yield {"rows": np.zeros(1, np.int64), "documents": empty, "starts": empty}
        count, pieces = len(offsets) - 1, 0
        window = max(WINDOW_DOCUMENTS, WINDOW_ROWS * length * count // int(offsets[-1]))
        for first in range(0, count, window):
            documents, lengths = read_lengths(offsets, order, first, window)
            parts = -(-lengths // length)  # pieces of each document
            first_piece = np.repeat(np.cumsum(parts) - parts, parts)
            starts = length * (np.arange(len(first_piece)) - first_piece)
            documents, lengths = np.repeat(documents, parts), np.repeat(lengths, parts)
            rows = best_fit_decreasing(np.minimum(lengths - starts, length), length)
            by_row = np.argsort(rows, kind="stable")
            yield {
                "rows": pieces + np.cumsum(np.bincount(rows)),
                "documents": documents[by_row],
                "starts": starts[by_row],
            }
            pieces += len(rows)

    def row(self, row: int) -> Pieces:
        pieces = slice(int(self.rows[row]), int(self.rows[row + 1]))
        document, start = self.documents[pieces], self.starts[pieces]
        lengths = self.offsets[document + 1] - self.offsets[document]
        return Pieces(document=document, start=start, stop=np.minimum(start + self.length, lengths))


PACKINGS: dict[str, type[Stream | BestFit]] = {"stream": Stream, "best_fit": BestFit}


def read_lengths(offsets: np.ndarray, order: Permutation, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the documents `first` to `first + count` of an order, and their numbers of tokens: int64 [count] each."""
    documents = order(np.arange(first, min(first + count, len(offsets) - 1)))
    return documents, offsets[documents + 1] - offsets[documents]


def best_fit_decreasing(lengths: np.ndarray, length: int) -> np.ndarray:
    """Return the row of each piece, int64 [P], for rows of `length` tokens. No piece is longer than a row."""
    rows = np.empty(len(lengths), np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    free: list[int] = []  # room of the rows that are not full, ascending, and the number of each
    numbers: list[int] = []
    count = 0
    for piece, size in zip(by_length.tolist(), lengths[by_length].tolist(), strict=True):
        best = bisect_left(free, size)
        if best < len(free):
            room, row = free.pop(best) - size, numbers.pop(best)
        else:
            room, row, count = length - size, count, count + 1
        rows[piece] = row
        if room:
            index = bisect_left(free, room)
            free.insert(index, room)
            numbers.insert(index, row)
    return rows
