"""Batches of packed text: rows are gathered from the memory-mapped tokens of all documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sightline.batch import IGNORE, PADDING, Batch, RowBuilder
from sightline.data.array_cache import default_cache_dir
from sightline.data.documents import Documents
from sightline.data.epochs import PADDING_ROW, EpochLoader
from sightline.data.packing import PACKINGS, Pieces, make_plan
from sightline.data.tokenizer import Tokenizer
from sightline.data.tokens import TokenizedDocuments, tokenize_documents


class Loader(EpochLoader):
    """Iterator of batches of packed documents; see `EpochLoader`. The first loader of some documents tokenizes them.

    cache_dir  directory for the tokens of the documents; default: `sightline` in the user's cache directory
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        *,
        rows: int,
        sequence_length: int,
        packing: str = "stream",
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        epochs: int | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        if sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2 (one input token, one label), got {sequence_length}")
        if packing not in PACKINGS:
            raise ValueError(f"packing must be one of {', '.join(PACKINGS)}, got {packing!r}")
        if not documents:
            raise ValueError(f"{documents.source} contains no training documents; expected at least one")
        super().__init__(rows=rows, seed=seed, rank=rank, world=world, epochs=epochs)
        cache_dir = default_cache_dir() if cache_dir is None else cache_dir.expanduser()
        self._tokens = tokenize_documents(documents, tokenizer, cache_dir)
        self._plan = make_plan(
            self._tokens, packing=packing, sequence_length=sequence_length, seed=seed, cache_dir=cache_dir
        )
        self._length, self._pad_token = sequence_length, tokenizer.eos_id
        self.rows_per_epoch = rows_per_epoch = self._plan.num_rows
        num_tokens = len(self._tokens.tokens)
        self.contents = (
            f"{len(documents):,} documents, {num_tokens:,} tokens, {rows_per_epoch:,} rows of {sequence_length:,}, "
            f"{num_tokens / (rows_per_epoch * sequence_length):.1%} full"
        )
        self.identity = {
            "documents": len(documents),
            "contents": documents.digest,
            "tokenizer": tokenizer.fingerprint,
            "packing": packing,
            "sequence_length": sequence_length,
            "rows": rows,
            "seed": seed,
        }

    def build(self, rows: np.ndarray, plan_rows: np.ndarray) -> Batch:
        shape = (len(plan_rows), self._length)
        tokens, labels = np.full(shape, self._pad_token, np.int64), np.full(shape, IGNORE, np.int64)
        document_ids, positions = np.full(shape, PADDING, np.int32), np.zeros(shape, np.int32)
        for row, plan_row in enumerate(plan_rows.tolist()):
            if plan_row != PADDING_ROW:
                pieces = self._plan.row(plan_row)
                gather_row(self._tokens, pieces, tokens[row], labels[row], document_ids[row], positions[row])
        return Batch(
            tokens=torch.from_numpy(tokens),
            labels=torch.from_numpy(labels),
            document_ids=torch.from_numpy(document_ids),
            positions=torch.from_numpy(positions),
        )


def gather_row(
    documents: TokenizedDocuments,
    pieces: Pieces,
    tokens: np.ndarray,
    labels: np.ndarray,
    document_ids: np.ndarray,
    positions: np.ndarray,
) -> None:
    """Write the pieces into the arrays of one row, [S] each, which are filled with padding.

    The last label of a piece is the next token of its document, IGNORE at the end of the document.
    """
    lengths = pieces.stop - pieces.start
    ends = np.cumsum(lengths)
    size = int(ends[-1])
    positions[:size] = np.arange(size) - np.repeat(ends - lengths - pieces.start, lengths)
    document_ids[:size] = np.repeat(np.arange(len(lengths)), lengths)
    first, stop = documents.offsets[pieces.document], documents.offsets[pieces.document + 1]
    tokens[:size] = documents.tokens[np.repeat(first, lengths) + positions[:size]]
    labels[: size - 1] = tokens[1:size]
    following = first + pieces.stop
    continues = following < stop
    labels[ends - 1] = IGNORE
    labels[ends[continues] - 1] = documents.tokens[following[continues]]


def validation_batches(
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    rows: int,
    rows_per_batch: int,
    sequence_length: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """Yield the first `rows` rows of the documents, in order, in batches of `rows_per_batch`.

    There are fewer rows if the documents end before; the last row is then padded. The last batch may be smaller. The
    rows are divided equally among the ranks, with batches of the same sizes: rows of padding are added if necessary.
    """
    packed = [RowBuilder(sequence_length)]
    for text in documents:
        ids, start = tokenizer.encode(text), 0
        while start < len(ids) and len(packed) <= rows:
            start = packed[-1].add(ids, start)
            if packed[-1].free == 0:
                packed.append(RowBuilder(sequence_length))
        if len(packed) > rows:
            break
    packed = [row for row in packed if row.tokens]
    packed += [RowBuilder(sequence_length) for _ in range(-len(packed) % world)]
    finished = [row.finish(tokenizer.eos_id) for row in packed]
    per_rank = len(finished) // world
    local = finished[rank * per_rank : (rank + 1) * per_rank]
    for first in range(0, per_rank, rows_per_batch):
        yield Batch.from_rows(local[first : first + rows_per_batch])
