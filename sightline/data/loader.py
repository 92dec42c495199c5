"""Batches of packed rows without end, and the exact cursor in them to go on from.

The rows of a run are dealt out over shards. A shard is a stream of its own: in every epoch it reads its section of that
epoch's random order of all documents, and packs it. Row after row comes from shard after shard:

    3 rows a step, 9 shards       step 0   shards 0 1 2
                                 step 1   shards 3 4 5
                                 step 2   shards 6 7 8
                                 step 3   shards 0 1 2    where they stopped in step 0

So a long document is spread over many steps, and no step sees little else. And a data-parallel rank packs the shards of
its own rows and no other: on any number of ranks a run has the same rows, and it may go on with another number.
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

State = dict[str, Any]  # plain ints, strings, lists and dicts: json and torch write it and read it back

MIN_SHARDS = 8
"""The fewest shards of a run: also a run of one row a step mixes as many cursors of the text."""

NAMES = {
    "documents": "number of training documents",
    "lengths": "digest of the training documents' lengths",
    "tokenizer": "digest of the tokenizer",
    "packing": "--data.packing",
    "sequence_length": "--training.sequence-length",
    "rows": "--training.global-batch-size",
    "seed": "--seed",
    "ranks": "number of data-parallel ranks",
}
"""Fields of a loader's `identity`, in words: a state means the same cursor only where all that it has are equal."""


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """What decides the rows of a `Loader`: number of documents, digests of their lengths and of the tokenizer, ..."""

    documents: int
    lengths: str
    tokenizer: str
    packing: str
    sequence_length: int
    rows: int
    seed: int


def check_state(identity: State, state: State) -> None:
    """Refuse a state that was saved with another identity than the loader has that loads it.

    Raises: ValueError naming the first field that differs.
    """
    for name, here in identity.items():
        came = state["identity"].get(name)
        if came != here:
            raise ValueError(
                f"the loader's state was saved with another {NAMES[name]}: {came!r} there, {here!r} here; continue "
                "with what it was saved with, or start a new run in another output directory"
            )


class Loader:
    """An endless iterator of batches: of the `rows` packed rows a step, those of this data-parallel rank.

    The next batch is tokenized and packed in a background thread while the caller computes on this one. A loader made
    alike, but for the rank and the number of ranks, that loads the joined states of all ranks yields the same batches
    from there to the bit.
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
        if packing not in PACKERS:
            raise ValueError(f"packing must be one of {', '.join(PACKERS)}, got {packing!r}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if not documents:
            raise ValueError(f"{documents.source} holds no training documents; expected at least one")
        self._mine = rows_of_rank(rows, rank, world)
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
        self._count = rows * -(-MIN_SHARDS // rows)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sightline-loader")
        self._state: State
        self._shards: dict[int, _Shard]
        self._prepared: Future[tuple[Batch, State]] | None
        beginning: State = {"epoch": 0, "next_document": 0, "waiting": []}
        self._start({"step": 0, "shards": {str(shard): beginning for shard in self._local_shards()}})

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
        self._prepared = self._thread.submit(self._next_batch, self._shards, self._state)
        return self._prepared

    def _next_batch(self, shards: dict[int, _Shard], before: State) -> tuple[Batch, State]:
        """A batch, and the state after it. In the background thread: it may outlive the loader's own shards."""
        first = before["step"] * self._config.rows
        turn = [(first + row) % self._count for row in self._mine]
        batch = Batch.from_rows([shards[shard].next_row() for shard in turn])
        cursors = before["shards"] | {str(shard): shards[shard].cursor() for shard in turn}
        return batch, {"step": before["step"] + 1, "shards": cursors}

    def state_dict(self) -> State:
        """Where the batch after the one handed out last begins; `join_states` joins those of all ranks."""
        return {"identity": asdict(self._config), **self._state}

    def load_state_dict(self, state: State) -> None:
        """Go on from the joined state of all ranks, however many there were. Raises as `check_state`."""
        state = _use_new_names(state)
        check_state(asdict(self._config), state)
        cursors = {str(shard): state["shards"][str(shard)] for shard in self._local_shards()}
        self._start({"step": state["step"], "shards": cursors})

    def close(self) -> None:
        """Stop the background thread. A loader that is never closed does not keep the process from ending."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _local_shards(self) -> list[int]:
        return [shard for shard in range(self._count) if shard % self._config.rows in self._mine]

    def _start(self, state: State) -> None:
        self._state = state
        self._shards = {
            shard: _Shard(
                self._documents, self._tokenizer, self._config, shard, self._count, state["shards"][str(shard)]
            )
            for shard in self._local_shards()
        }
        self._prepared = None


def join_states(states: Sequence[State]) -> State:
    """What the loaders of any number of ranks load, from the states of all ranks' loaders after the same step."""
    shards: State = {shard: cursor for state in states for shard, cursor in state["shards"].items()}
    return {**states[0], "shards": dict(sorted(shards.items(), key=lambda item: int(item[0])))}


def _use_new_names(state: State) -> State:
    """A state as this version writes it: before version 0.3 `shards` was called lanes and `next_document` place."""
    if "lanes" not in state:
        return state
    shards = {
        shard: {"next_document" if name == "place" else name: value for name, value in old.items()}
        for shard, old in state["lanes"].items()
    }
    return {**{name: value for name, value in state.items() if name != "lanes"}, "shards": shards}


def rows_of_rank(rows: int, rank: int, world: int) -> range:
    """Which of the `rows` rows of a step a data-parallel rank has: rank r those from r * rows / world on.

    Errors: ValueError where they cannot be shared equally.
    """
    if rows < 1:
        raise ValueError(f"a batch must have at least 1 row, got rows={rows}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be at least 0 and under world={world}, got {rank}")
    if rows % world:
        raise ValueError(
            f"{rows} rows a step (--training.global-batch-size) cannot be shared equally among {world} data-parallel "
            f"ranks (replicate x shard); numbers of ranks that divide them: {divisors(rows)}"
        )
    share = rows // world
    return range(rank * share, (rank + 1) * share)


class _Shard:
    """The rows of one shard from some cursor on."""

    def __init__(
        self, documents: Documents, tokenizer: Tokenizer, config: LoaderConfig, shard: int, shards: int, cursor: State
    ) -> None:
        self.documents, self.tokenizer, self.seed = documents, tokenizer, config.seed
        # Of N documents a shard takes every `shards`-th. Where there are fewer than shards, shard, shard + N, ... would read
        # the same ones: each then reads its part of them.
        self.section = slice(shard % len(documents), None, shards)
        self.part, self.parts = shard // len(documents), len(range(shard % len(documents), shards, len(documents)))
        self.epoch, self.next_document = cursor["epoch"], cursor["next_document"]
        whole = {document: self._piece(document) for document in {document for document, _ in cursor["waiting"]}}
        waiting = [whole[document]._replace(at=at) for document, at in cursor["waiting"]]
        self.packer = PACKERS[config.packing](config.sequence_length, tokenizer.eos_id, waiting)
        self.pieces = self._endless()

    def next_row(self) -> Row:
        row = self.packer.next_row(self.pieces)
        assert row is not None, "the documents never end"
        return row

    def cursor(self) -> State:
        """What comes next, and what waits: enough to go on from."""
        waiting = [[piece.document, piece.at] for piece in self.packer.waiting]
        return {"epoch": self.epoch, "next_document": self.next_document, "waiting": waiting}

    def _endless(self) -> Iterator[Piece]:
        """The documents of this shard, epoch after epoch. `epoch` and `next_document` always say what comes next."""
        while True:
            section = _shuffled(self.seed, self.epoch, len(self.documents))[self.section]
            while self.next_document < len(section):
                self.next_document += 1
                yield self._piece(int(section[self.next_document - 1]))
            self.epoch, self.next_document = self.epoch + 1, 0

    def _piece(self, document: int) -> Piece:
        tokens = self.tokenizer.encode(self.documents[document])
        at = len(tokens) * self.part // self.parts
        end = max(at + 1, len(tokens) * (self.part + 1) // self.parts)  # a text may have fewer tokens than parts
        return Piece(document, tokens[:end], at)


@lru_cache(maxsize=2)
def _shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of an epoch, int64 [count]. Kept for the shards that come to it later; they are never far apart."""
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
    """At most `rows` rows of the documents in order, the same ones every time, in batches of `rows_per_batch`.

    Fewer where the documents end before; then the last row is padded. The last batch may have fewer rows. Of many
    ranks each has an equal share of the rows, and batches of the same sizes: rows of padding fill what is missing.
    """
    packer = Stream(sequence_length, tokenizer.eos_id)
    pieces = (Piece(index, tokenizer.encode(documents[index])) for index in range(len(documents)))
    finished = list(islice(iter(lambda: packer.next_row(pieces), None), rows))
    finished += [RowBuilder(sequence_length).finish(tokenizer.eos_id)] * (-len(finished) % world)
    share = len(finished) // world
    mine = finished[rank * share : (rank + 1) * share]
    for first in range(0, share, rows_per_batch):
        yield Batch.from_rows(mine[first : first + rows_per_batch])
