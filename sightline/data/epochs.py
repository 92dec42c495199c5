"""Batches of rows that are numbered through the run: the state of a loader is the number of rows before the next step.

The documents are packed once into a plan of R rows (`sightline.data.packing`). Epoch e consists of the rows e * R to
(e + 1) * R of the run: all rows of the plan, in an order that depends on the seed and the epoch, so the rows of a long
document are spread over many steps. Each epoch therefore has every token of every document exactly once, for any number
of rows per step and of ranks; it may end within a step. After the last epoch, all rows are padding, which does not
count: if the run is continued with more epochs, the next step begins with the first row of the next epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from sightline.batch import Batch
from sightline.data.permutation import Permutation
from sightline.numbers import divisors

State = dict[str, Any]  # ints, strings, lists and dicts, so that JSON can hold it

VERSION = 2
"""Version of the state. States of version 0.2 have none: they hold the next document of each of several streams."""
PADDING_ROW = -1
ROW_ORDER = 2
"""Last number of the key of the order of an epoch's rows, so that it is unrelated to other permutations."""

IDENTITY_LABELS = {
    "documents": "number of training documents",
    "contents": "digest of the training documents",
    "tokenizer": "digest of the tokenizer",
    "packing": "--data.packing",
    "sequence_length": "--training.sequence-length",
    "rows": "--training.global-batch-size",
    "seed": "--seed",
    "ranks": "number of data-parallel ranks",
}
"""Names of the `identity` fields in error messages. A state is valid only for a loader with the same identity."""

NEW_ORDER = (
    "the checkpoint was written by an older version, and the order of documents has changed since: documents of the "
    "current epoch may be repeated or missed; later epochs have each document exactly once"
)


def check_state(identity: State, state: State) -> None:
    """Check that a state was saved by a loader with this identity. A state of version 0.2 has fewer fields.

    Raises:
        ValueError: if a field of the identity differs; the message names the first one.
    """
    if state.get("version", VERSION) > VERSION:
        raise ValueError(
            f"the loader state has version {state['version']}, but this version of Sightline reads versions up to "
            f"{VERSION}; use the version of Sightline that saved it"
        )
    for name, actual in identity.items():
        saved = state["identity"].get(name, None if "version" in state else actual)
        if saved != actual:
            raise ValueError(
                f"the loader state was saved with another {IDENTITY_LABELS[name]}: got {actual!r}, expected {saved!r}; "
                "use the saved value, or start a new run in another output directory"
            )


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


class EpochLoader:
    """Base class of iterators of batches: the rows of one data-parallel rank, out of the `rows` rows of each step.

    It never ends; with `epochs`, all rows after the last epoch are padding. A background thread builds the next batch
    while the caller uses the current one. To resume, create the loaders with the same arguments, on any number of ranks
    and with any number of epochs, and load the state of any rank: they continue with exactly the same batches.

    A subclass sets the attributes and defines `build`.

    rows_per_epoch  number of rows of the plan
    identity        the values that determine the rows
    contents        the contents of an epoch as text, for the log
    """

    rows_per_epoch: int
    identity: State
    contents: str

    def __init__(self, *, rows: int, seed: int = 0, rank: int = 0, world: int = 1, epochs: int | None = None) -> None:
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self._local_rows = np.array(rows_of_rank(rows, rank, world))
        self._rows, self._seed, self._epochs = rows, seed, epochs
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sightline-loader")
        self._step, self._row = 0, 0
        self._prepared: Future[Batch] | None = None

    def build(self, rows: np.ndarray, plan_rows: np.ndarray) -> Batch:
        """Return a batch. Called in the background thread.

        rows       int64 [B], index of each row in the run
        plan_rows  int64 [B], the row of the plan, or PADDING_ROW
        """
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._prepared = self._prepared or self._prepare()
        # If this raises, the failed batch stays in `_prepared`: further calls raise the same error instead of skipping
        # the batch.
        batch = self._prepared.result()
        self._step += 1
        self._row += min(self._rows, self._remaining_rows())
        self._prepared = self._prepare()
        return batch

    def _prepare(self) -> Future[Batch]:
        rows = self._row + self._local_rows
        return self._thread.submit(lambda: self.build(rows, self._plan_rows(rows)))

    def _plan_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return the row of the plan for each row of the run."""
        epochs, index = np.divmod(rows, self.rows_per_epoch)
        plan_rows = np.full_like(rows, PADDING_ROW)
        for epoch in np.unique(epochs).tolist():
            if self._epochs is None or epoch < self._epochs:
                order = Permutation(self.rows_per_epoch, self._seed, epoch, ROW_ORDER)
                plan_rows[epochs == epoch] = order(index[epochs == epoch])
        return plan_rows

    def _remaining_rows(self) -> int:
        """Return the number of rows up to the end of the last epoch; if epochs are not limited, those of one step."""
        return self._rows if self._epochs is None else max(0, self._epochs * self.rows_per_epoch - self._row)

    @property
    def steps(self) -> int | None:
        """Number of steps at the end of the last epoch, which may be padded; None if the epochs are not limited."""
        return None if self._epochs is None else self._step - (-self._remaining_rows() // self._rows)

    @property
    def epoch(self) -> float:
        """Number of epochs in the batches that were returned by `next`."""
        return self._row / self.rows_per_epoch

    def describe(self) -> str:
        """Return the contents of an epoch, and the number of steps of the run if the epochs are limited."""
        if self._epochs is None:
            return self.contents
        epochs = "1 epoch" if self._epochs == 1 else f"{self._epochs:,} epochs"
        return f"{self.contents}; {epochs} of {self.rows_per_epoch:,} rows = {self.steps:,} steps"

    def state_dict(self) -> State:
        """Return the position after the last batch returned by `next`, which is the same on all ranks."""
        return {"version": VERSION, "identity": dict(self.identity), "step": self._step, "row": self._row}

    def load_state_dict(self, state: State) -> str | None:
        """Continue from this state; the number of ranks may have changed. Returns a warning for the user, if any.

        Raises:
            ValueError: if the state was saved by another loader; see `check_state`.
        """
        check_state(self.identity, state)
        self._step, self._prepared = state["step"], None
        self._row = state.get("row", self._step * self._rows)
        return None if "version" in state else NEW_ORDER

    def close(self) -> None:
        """Stop the background thread. A loader that is not closed does not block the exit of the process."""
        self._thread.shutdown(wait=True, cancel_futures=True)
