"""Batches of packed rows without end, and the exact place in them to go on from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np

from sightline.batch import Batch, Row
from sightline.data.documents import Documents
from sightline.data.packing import PACKERS, Piece, Stream
from sightline.data.tokenizer import Tokenizer

State = dict[str, Any]  # plain ints, strings, lists and dicts: json and torch write it and read it back

NAMES = {
    "documents": "number of training documents",
    "lengths": "digest of the training documents' lengths",
    "tokenizer": "digest of the tokenizer",
    "packing": "--data.packing",
    "sequence_length": "--training.sequence-length",
    "seed": "--seed",
    "rank": "data-parallel rank",
    "world": "number of data-parallel ranks",
}
"""What must be equal for a state to mean the same place, in words."""


class Loader:
    """An endless iterator of batches, `rows` packed rows each.

    Every epoch reads all documents in a new random order, of which each data-parallel rank takes every `world`-th. The
    next batch is tokenized and packed in a background thread while the caller computes on this one.

    `state_dict()` describes the place after the batch handed out last, whatever has been prepared beyond it. A loader
    made alike that loads it yields the same batches from there to the bit. The rows of a batch are not part of the
    place: they may change.
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
    ) -> None:
        if sequence_length < 2:
            raise ValueError(
                f"sequence_length must be at least 2 (one token to see, one to predict), got {sequence_length}"
            )
        if rows < 1:
            raise ValueError(f"a batch must have at least 1 row, got rows={rows}")
        if packing not in PACKERS:
            raise ValueError(f"packing must be one of {', '.join(PACKERS)}, got {packing!r}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be at least 0 and under world={world}, got {rank}")
        if len(documents) < world:
            raise ValueError(
                f"{len(documents)} training documents cannot be shared among {world} data-parallel ranks: expected at "
                "least one for each; use fewer ranks or a source with more documents"
            )
        self._documents, self._tokenizer, self._rows = documents, tokenizer, rows
        self._identity = {
            "documents": len(documents),
            "lengths": hashlib.sha256(documents.lengths.astype("<i8").tobytes()).hexdigest()[:16],
            "tokenizer": tokenizer.fingerprint,
            "packing": packing,
            "sequence_length": sequence_length,
            "seed": seed,
            "rank": rank,
            "world": world,
        }
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sightline-loader")
        self._state: State
        self._source: _Rows
        self._prepared: Future[tuple[Batch, State]] | None
        self._start({"epoch": 0, "place": 0, "waiting": []})

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        prepared = self._prepared or self._prepare()
        # Where this raises, the failed batch stays the prepared one: whoever asks again gets the error again, never a
        # batch beyond it.
        batch, self._state = prepared.result()
        self._prepare()
        return batch

    def _prepare(self) -> Future[tuple[Batch, State]]:
        self._prepared = self._thread.submit(self._source.next_batch, self._rows)
        return self._prepared

    def state_dict(self) -> State:
        """Where the batch after the one handed out last begins."""
        return {"identity": dict(self._identity), **self._state}

    def load_state_dict(self, state: State) -> None:
        """Go on from there.

        Errors: ValueError naming the field, where the state was made with other documents, another tokenizer, packing,
        length, seed or share of the documents.
        """
        came = state["identity"]
        for name, words in NAMES.items():
            if came.get(name) != self._identity[name]:
                raise ValueError(
                    f"the loader's state was saved with another {words}: {came.get(name)!r} there, "
                    f"{self._identity[name]!r} here; continue with what it was saved with, or start a new run in "
                    "another output directory"
                )
        self._start({name: state[name] for name in ("epoch", "place", "waiting")})

    def close(self) -> None:
        """Stop the background thread. A loader that is never closed does not keep the process from ending."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start(self, state: State) -> None:
        self._state = state
        self._source = _Rows(self._documents, self._tokenizer, self._identity, state)
        self._prepared = None


class _Rows:
    """The rows of one rank from some place on, made by whoever asks: the loader without its thread."""

    def __init__(self, documents: Documents, tokenizer: Tokenizer, identity: State, state: State) -> None:
        self.documents, self.tokenizer, self.identity = documents, tokenizer, identity
        self.epoch, self.place = state["epoch"], state["place"]
        whole = {document: self._piece(document) for document in {document for document, _ in state["waiting"]}}
        waiting = [whole[document]._replace(at=at) for document, at in state["waiting"]]
        self.packer = PACKERS[identity["packing"]](identity["sequence_length"], tokenizer.eos_id, waiting)
        self.pieces = self._endless()

    def next_batch(self, rows: int) -> tuple[Batch, State]:
        """A batch, and the state after it."""
        batch = Batch.from_rows([self._next_row() for _ in range(rows)])
        waiting = [[piece.document, piece.at] for piece in self.packer.waiting]
        return batch, {"epoch": self.epoch, "place": self.place, "waiting": waiting}

    def _next_row(self) -> Row:
        row = self.packer.next_row(self.pieces)
        assert row is not None, "the documents never end"
        return row

    def _endless(self) -> Iterator[Piece]:
        """Every document of this rank, epoch after epoch. `epoch` and `place` always say what comes next."""
        rank, world = self.identity["rank"], self.identity["world"]
        while True:
            shuffled = np.random.default_rng((self.identity["seed"], self.epoch)).permutation(len(self.documents))
            for document in shuffled[rank::world][self.place :].tolist():
                self.place += 1
                yield self._piece(document)
            self.epoch, self.place = self.epoch + 1, 0

    def _piece(self, document: int) -> Piece:
        return Piece(document, self.tokenizer.encode(self.documents[document]))


def validation_batches(
    documents: Documents, tokenizer: Tokenizer, *, rows: int, rows_per_batch: int, sequence_length: int
) -> Iterator[Batch]:
    """At most `rows` rows of the documents in order, the same ones every time, in batches of `rows_per_batch`.

    Fewer where the documents end before; then the last row is padded. The last batch may have fewer rows.
    """
    packer = Stream(sequence_length, tokenizer.eos_id)
    pieces = (Piece(index, tokenizer.encode(documents[index])) for index in range(len(documents)))
    finished = islice(iter(lambda: packer.next_row(pieces), None), rows)
    while batch := list(islice(finished, rows_per_batch)):
        yield Batch.from_rows(batch)
