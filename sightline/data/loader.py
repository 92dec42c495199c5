"""Infinite stream of packed batches with an exact, resumable position.

The documents of a run are divided over shards. In each epoch, a shard packs its section of that epoch's random order of
all documents. The rows of the steps are taken from the shards in turn, and each shard continues at its cursor:

    3 rows a step, 9 shards       step 0   shards 0 1 2
                                  step 1   shards 3 4 5
                                  step 2   shards 6 7 8
                                  step 3   shards 0 1 2    from their cursors after step 0

This spreads a long document over many steps, so that no step consists mostly of one document. Each data-parallel rank
packs only the shards of its rows: the rows of a run do not depend on the number of ranks, which may change on resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np

from sightline.batch import Batch, Row, RowBuilder
from sightline.data.documents import Documents
from sightline.data.packing import PACKERS, Piece, Stream
from sightline.data.tokenizer import Tokenizer
from sightline.numbers import divisors

State = dict[str, Any]  # ints, strings, lists and dicts, so that JSON can hold it

MIN_SHARDS = 8
"""Minimum number of shards, so that consecutive steps of a run with few rows per step read different documents."""

IDENTITY_LABELS = {
    "documents": "number of training documents",
    "lengths": "digest of the training documents' lengths",
    "tokenizer": "digest of the tokenizer",
    "packing": "--data.packing",
    "sequence_length": "--training.sequence-length",
    "rows": "--training.global-batch-size",
    "seed": "--seed",
    "ranks": "number of data-parallel ranks",
}
"""Names of the `identity` fields in error messages. A state is valid only for a loader with the same identity."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Identity of a `Loader`: all values that determine its rows. `lengths` and `tokenizer` are digests."""

    documents: int
    lengths: str
    tokenizer: str
    packing: str
    sequence_length: int
    rows: int
    seed: int


def check_state(identity: State, state: State) -> None:
    """Check that a state was saved by a loader with this identity.

    Raises:
        ValueError: if a field of the identity differs; the message names the first one.
    """
    for name, actual in identity.items():
        saved = state["identity"].get(name)
        if saved != actual:
            raise ValueError(
                f"the loader state was saved with another {IDENTITY_LABELS[name]}: got {actual!r}, expected {saved!r}; "
                "use the saved value, or start a new run in another output directory"
            )


class Loader:
    """Infinite iterator of batches: the rows of this data-parallel rank, out of the `rows` packed rows of each step.

    A background thread tokenizes and packs the next batch while the caller uses the current one. To resume, create the
    loaders with the same arguments, on any number of ranks, and load the joined state of all ranks: they continue with
    exactly the same batches.
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
            raise ValueError(f"sequence_length must be at least 2 (one input token, one label), got {sequence_length}")
        if packing not in PACKERS:
            raise ValueError(f"packing must be one of {', '.join(PACKERS)}, got {packing!r}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if not documents:
            raise ValueError(f"{documents.source} contains no training documents; expected at least one")
        self._local_rows = rows_of_rank(rows, rank, world)
        self._documents, self._tokenizer = documents, tokenizer
        self._config = LoaderConfig(
            documents=len(documents),
            lengths=hashlib.sha256(documents.lengths.astype("<i8").tobytes()).hexdigest()[:16],
            tokenizer=tokenizer.fingerprint,
            packing=packing,
            sequence_length=sequence_length,
            rows=rows,
            seed=seed,
        )
        self._num_shards = rows * -(-MIN_SHARDS // rows)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sightline-loader")
        self._state: State
        self._shards: dict[int, _Shard]
        self._prepared: Future[tuple[Batch, State]] | None
        start: State = {"epoch": 0, "next_document": 0, "waiting": []}
        self._start({"step": 0, "shards": {str(shard): start for shard in self._local_shards()}})

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        prepared = self._prepared or self._prepare()
        # If this raises, the failed batch stays in `_prepared`: further calls raise the same error instead of skipping
        # the batch.
        batch, self._state = prepared.result()
        self._prepare()
        return batch

    def _prepare(self) -> Future[tuple[Batch, State]]:
        self._prepared = self._thread.submit(self._next_batch, self._shards, self._state)
        return self._prepared

    def _next_batch(self, shards: dict[int, _Shard], before: State) -> tuple[Batch, State]:
        """Return a batch and the state after it. Runs in the background thread, possibly after a new `_start`."""
        first = before["step"] * self._config.rows
        order = [(first + row) % self._num_shards for row in self._local_rows]
        batch = Batch.from_rows([shards[shard].next_row() for shard in order])
        cursors = before["shards"] | {str(shard): shards[shard].cursor() for shard in order}
        return batch, {"step": before["step"] + 1, "shards": cursors}

    def state_dict(self) -> State:
        """Return the position after the last batch returned by `next`. `join_states` merges the states of all ranks."""
        return {"identity": asdict(self._config), **self._state}

    def load_state_dict(self, state: State) -> None:
        """Continue from the joined state of all ranks; the number of ranks may have changed.

        Raises:
            ValueError: if the state was saved by another loader; see `check_state`.
        """
        state = use_new_names(state)
        check_state(asdict(self._config), state)
        cursors = {str(shard): _use_new_cursor_names(state["shards"][str(shard)]) for shard in self._local_shards()}
        self._start({"step": state["step"], "shards": cursors})

    def close(self) -> None:
        """Stop the background thread. A loader that is not closed does not block the exit of the process."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _local_shards(self) -> list[int]:
        return [shard for shard in range(self._num_shards) if shard % self._config.rows in self._local_rows]

    def _start(self, state: State) -> None:
        self._state = state
        self._shards = {
            shard: _Shard(
                self._documents, self._tokenizer, self._config, shard, self._num_shards, state["shards"][str(shard)]
            )
            for shard in self._local_shards()
        }
        self._prepared = None


def join_states(states: Sequence[State]) -> State:
    """Merge the loader states of all ranks after a step into one state, which any number of ranks can load."""
    shards: State = {shard: cursor for state in states for shard, cursor in state["shards"].items()}
    return {**states[0], "shards": dict(sorted(shards.items(), key=lambda item: int(item[0])))}


def use_new_names(state: State) -> State:
    """Return the state with the key `shards`, which version 0.2 called lanes."""
    return {"shards" if name == "lanes" else name: value for name, value in state.items()}


def _use_new_cursor_names(cursor: State) -> State:
    """Return the cursor with the key `next_document`, which version 0.2 called place."""
    return {"next_document" if name == "place" else name: value for name, value in cursor.items()}


def rows_of_rank(rows: int, rank: int, world: int) -> range:
    """Return the indices of the rows of a step on a data-parallel rank: rows / world consecutive rows.

    Raises:
        ValueError: if the rows cannot be divided equally among the ranks.
    """
    if rows < 1:
        raise ValueError(f"a batch must have at least 1 row, got rows={rows}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be at least 0 and less than world={world}, got {rank}")
    if rows % world:
        raise ValueError(
            f"{rows} rows per step (--training.global-batch-size) are not divisible by {world} data-parallel ranks "
            f"(replicate x shard); numbers of ranks that divide them: {divisors(rows)}"
        )
    local_rows = rows // world
    return range(rank * local_rows, (rank + 1) * local_rows)


class _Shard:
    """Infinite stream of the rows of one shard, from a cursor on."""

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        config: LoaderConfig,
        shard: int,
        num_shards: int,
        cursor: State,
    ) -> None:
        self.documents, self.tokenizer, self.seed = documents, tokenizer, config.seed
        # A shard reads every `num_shards`-th document of an epoch's order. With N < num_shards documents, the shards
        # i, i + N, i + 2N, ... read the same document: each of them takes one of `parts` parts of its tokens.
        first = shard % len(documents)
        self.section = slice(first, None, num_shards)
        self.part, self.parts = shard // len(documents), len(range(first, num_shards, len(documents)))
        self.epoch, self.next_document = cursor["epoch"], cursor["next_document"]
        pieces = {document: self._piece(document) for document in {document for document, _ in cursor["waiting"]}}
        waiting = [pieces[document]._replace(start=start) for document, start in cursor["waiting"]]
        self.packer = PACKERS[config.packing](config.sequence_length, tokenizer.eos_id, waiting)
        self.pieces = self._all_pieces()

    def next_row(self) -> Row:
        row = self.packer.next_row(self.pieces)
        assert row is not None, "the stream of documents is infinite"
        return row

    def cursor(self) -> State:
        """Return the position of this shard: the next document to read, and the pieces that wait to be packed."""
        waiting = [[piece.document, piece.start] for piece in self.packer.waiting]
        return {"epoch": self.epoch, "next_document": self.next_document, "waiting": waiting}

    def _all_pieces(self) -> Iterator[Piece]:
        """Yield the documents of this shard, epoch after epoch, and keep `epoch` and `next_document` up to date."""
        while True:
            section = _shuffled(self.seed, self.epoch, len(self.documents))[self.section]
            while self.next_document < len(section):
                self.next_document += 1
                yield self._piece(int(section[self.next_document - 1]))
            self.epoch, self.next_document = self.epoch + 1, 0

    def _piece(self, document: int) -> Piece:
        tokens = self.tokenizer.encode(self.documents[document])
        start = len(tokens) * self.part // self.parts
        end = max(start + 1, len(tokens) * (self.part + 1) // self.parts)  # a text may have fewer tokens than parts
        return Piece(document, tokens[:end], start)


@lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the order of an epoch, int64 [count]. Cached because the shards read it one after the other."""
    return np.random.default_rng((seed, epoch)).permutation(count)


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
    packer = Stream(sequence_length, tokenizer.eos_id)
    pieces = (Piece(index, tokenizer.encode(documents[index])) for index in range(len(documents)))
    packed = list(islice(iter(lambda: packer.next_row(pieces), None), rows))
    packed += [RowBuilder(sequence_length).finish(tokenizer.eos_id)] * (-len(packed) % world)
    per_rank = len(packed) // world
    local = packed[rank * per_rank : (rank + 1) * per_rank]
    for first in range(0, per_rank, rows_per_batch):
        yield Batch.from_rows(local[first : first + rows_per_batch])
