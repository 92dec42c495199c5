"""Batches of a run: the loader protocol, and selection of the loader from the config."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from sightline import config
from sightline.batch import Batch, ImageSizes
from sightline.data.documents import Documents
from sightline.data.epochs import State, check_state, rows_of_rank
from sightline.data.loader import Loader, validation_batches
from sightline.data.synthetic_images import SYNTHETIC_IMAGES, ImageLoader, validation_images
from sightline.data.tokenizer import Tokenizer

Batches = Iterable[Batch] | Callable[[int, int], Iterable[Batch]]
"""User-provided batches, one per step: an iterable, or a function (rank, world) -> iterable of that rank's batches."""


class DataLoader(Protocol):
    """Iterator of batches, one per optimizer step, with the rows of one data-parallel rank."""

    @property
    def steps(self) -> int | None:
        """Number of steps of all epochs; None if the number of epochs is not limited."""
        ...

    @property
    def epoch(self) -> float | None:
        """Number of epochs in the batches that were returned so far; None if unknown."""
        ...

    def __next__(self) -> Batch: ...

    def describe(self) -> str:
        """Return the size of an epoch as text for the log."""
        ...

    def state_dict(self) -> State:
        """Return the position of the next batch, as JSON values. `join_states` merges the states of all ranks."""
        ...

    def load_state_dict(self, state: State) -> str | None:
        """Continue from the joined state of all ranks. Returns a warning for the user, if any.

        Raises:
            ValueError: if the state was saved by another loader.
        """
        ...

    def close(self) -> None: ...


def open_loader(
    data: config.DataConfig,
    training: config.TrainingConfig,
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    batches: Batches | None = None,
    images: ImageSizes | None = None,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> DataLoader:
    """Return the loader of the training batches of one of `world` data-parallel ranks.

    batches  user-provided batches, used instead of the documents
    images   image properties of a vision-language model; None for text-only models
    """
    options: dict[str, Any] = {
        "rows": training.global_batch_size,
        "sequence_length": training.sequence_length,
        "rank": rank,
        "world": world,
    }
    if batches is not None:
        if data.epochs is not None:
            raise ValueError(
                f"data.epochs is {data.epochs}, but the length of an epoch of your own batches is unknown; set "
                "training.steps, and data.epochs None"
            )
        return IterableLoader(batches, **options)
    options |= {"seed": seed, "epochs": data.epochs}
    if data.source == SYNTHETIC_IMAGES:
        return ImageLoader(documents, tokenizer, images=images, **options)
    return Loader(documents, tokenizer, packing=data.packing, cache_dir=data.cache_dir, **options)


def open_validation(
    data: config.DataConfig,
    training: config.TrainingConfig,
    validation: config.ValidationConfig,
    documents: Documents,
    tokenizer: Tokenizer,
    *,
    images: ImageSizes | None = None,
    rank: int = 0,
    world: int = 1,
) -> list[Batch]:
    """Return the validation batches of this rank: the same at every validation, and none if validation is off."""
    if validation.every == 0 or len(documents) == 0:
        return []
    options: dict[str, Any] = {
        "rows": validation.rows,
        "rows_per_batch": training.rows_per_forward(training.global_batch_size // world),
        "sequence_length": training.sequence_length,
        "rank": rank,
        "world": world,
    }
    if data.source == SYNTHETIC_IMAGES:
        return validation_images(documents, tokenizer, images=images, **options)
    return list(validation_batches(documents, tokenizer, **options))


class IterableLoader:
    """User-provided batches, whose shape is checked against the rows of this data-parallel rank.

    Runs can resume if the iterable has `state_dict()` (JSON values) and `load_state_dict(state)`, which is called
    before the iteration starts.

    Raises:
        ValueError: if there is one iterable for several ranks, which would all train on the same rows.
    """

    steps: int | None = None
    epoch: float | None = None

    def __init__(self, batches: Batches, *, rows: int, sequence_length: int, rank: int = 0, world: int = 1) -> None:
        if not callable(batches) and world > 1:
            raise ValueError(
                f"got one {type(batches).__name__} of batches for {world} data-parallel ranks, which would all "
                "train on the same rows; expected a function of (rank, world) that returns the batches of one rank"
            )
        self._source: Any = batches(rank, world) if callable(batches) else batches
        self._identity = {"sequence_length": sequence_length, "rows": rows, "ranks": world}
        self._shape = (len(rows_of_rank(rows, rank, world)), sequence_length)
        self._rank, self._step = str(rank), 0
        self._iterator: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        self._iterator = self._iterator or iter(self._source)
        batch = next(self._iterator, None)
        if batch is None:
            raise ValueError(
                f"the batches ended after step {self._step}, before the run did; expected one batch for each step: "
                f"provide more batches, or set training.steps {self._step}"
            )
        self._step += 1
        if batch.shape != self._shape:
            raise ValueError(
                f"the batch of step {self._step} has {batch.shape[0]} rows of {batch.shape[1]} tokens; expected "
                f"{self._shape[0]} rows of {self._shape[1]} tokens (training.global-batch-size / data-parallel ranks, "
                "training.sequence-length)"
            )
        return batch

    def state_dict(self) -> State:
        """Return the number of steps and the state of the iterable, if it has one.

        Raises:
            ValueError: if the state of the iterable is not JSON-serializable.
        """
        state = {self._rank: self._source.state_dict()} if self._has_state() else {}
        try:
            json.dumps(state)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"state_dict() of a {type(self._source).__name__} contains values that a checkpoint cannot store: "
                f"{error}; expected numbers, strings, lists and dictionaries of them"
            ) from error
        return {"identity": dict(self._identity), "step": self._step, "shards": state}

    def load_state_dict(self, state: State) -> str | None:
        """Continue from the joined state of all ranks.

        Raises:
            ValueError: if the state was saved by another loader (see `check_state`), or the batches have no state.
        """
        state = _use_new_names(state)
        check_state(self._identity, state)
        if not self._has_state() or self._rank not in state["shards"]:
            raise ValueError(
                f"the run stopped after step {state['step']}, and a {type(self._source).__name__} cannot resume there: "
                "batches need state_dict and load_state_dict, both now and when the run was saved; use batches that "
                "have both, or start a new run in another output directory"
            )
        self._source.load_state_dict(state["shards"][self._rank])
        self._iterator, self._step = None, state["step"]
        return None

    def describe(self) -> str:
        """Return that the length of an epoch is unknown."""
        return f"unknown, batches of a {type(self._source).__name__}"

    def close(self) -> None:
        """Do nothing: the caller owns the batches."""

    def _has_state(self) -> bool:
        return hasattr(self._source, "state_dict") and hasattr(self._source, "load_state_dict")


def join_states(states: Sequence[State]) -> State:
    """Merge the loader states of all ranks after a step into one state, which all ranks can load.

    Only the states of user-provided batches differ between ranks: each has those of its own batches in `shards`.
    """
    shards: State = {shard: own for state in states for shard, own in state.get("shards", {}).items()}
    return {**states[0], "shards": shards} if "shards" in states[0] else states[0]


def _use_new_names(state: State) -> State:
    """Return the state with the key `shards`, which version 0.2 called lanes."""
    return {"shards" if name == "lanes" else name: value for name, value in state.items()}
