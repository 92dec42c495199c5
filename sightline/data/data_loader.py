"""The batches of a run: what every loader can do, and which one a run has."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from sightline import config
from sightline.batch import Batch, ImageSizes
from sightline.data.documents import Documents
from sightline.data.loader import Loader, State, check_state, rows_of_rank, validation_batches
from sightline.data.synthetic_images import SYNTHETIC_IMAGES, ImageLoader, validation_images
from sightline.data.tokenizer import Tokenizer

Batches = Iterable[Batch] | Callable[[int, int], Iterable[Batch]]
"""Batches of a caller's own, one a step: an iterable, or a function of (rank, world) that returns the one of a rank."""


class DataLoader(Protocol):
    """An iterator of batches, one an optimizer step: of the step's rows, those of one data-parallel rank."""

    def __next__(self) -> Batch: ...

    def state_dict(self) -> State:
        """Where the next batch begins, as JSON values. `join_states` makes one of all ranks' states."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Go on from the joined state of all ranks.

        Raises: ValueError where it was saved by another loader.
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
    """The batches to train on: of all rows of an optimizer step, those of one of `world` data-parallel ranks.

    batches  the caller's own, in place of the documents
    images   how images stand in the model's rows; None where it reads text alone
    """
    options: dict[str, Any] = {
        "rows": training.global_batch_size,
        "sequence_length": training.sequence_length,
        "rank": rank,
        "world": world,
    }
    if batches is not None:
        return IterableLoader(batches, **options)
    if data.source == SYNTHETIC_IMAGES:
        return ImageLoader(documents, tokenizer, images=images, seed=seed, **options)
    return Loader(documents, tokenizer, packing=data.packing, seed=seed, **options)


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
    """The batches to validate on, always the same; none where the run does not validate. Ranks share the rows."""
    if validation.every == 0 or len(documents) == 0:
        return []
    options: dict[str, Any] = {
        "rows": validation.rows,
        "rows_per_batch": training.micro_batch_size,
        "sequence_length": training.sequence_length,
        "rank": rank,
        "world": world,
    }
    if data.source == SYNTHETIC_IMAGES:
        return validation_images(documents, tokenizer, images=images, **options)
    return list(validation_batches(documents, tokenizer, **options))


class IterableLoader:
    """A caller's own batches, checked to have the rows of this data-parallel rank.

    Where the iterable has `state_dict()` (JSON values) and `load_state_dict(state)`, a run goes on exactly where it
    was. `load_state_dict` is called before the first batch is asked for.

    Raises: ValueError for one iterable and several ranks: they would all train on the same rows.
    """

    def __init__(self, batches: Batches, *, rows: int, sequence_length: int, rank: int = 0, world: int = 1) -> None:
        if not callable(batches) and world > 1:
            raise ValueError(
                f"batches is one {type(batches).__name__} for {world} data-parallel ranks, which would all train on "
                "the same rows; expected a function of (rank, world) that returns the batches of one rank"
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
                f"the batches ended after step {self._step}, before the run did; give as many as training.steps, or "
                f"set training.steps {self._step}"
            )
        self._step += 1
        if batch.shape != self._shape:
            raise ValueError(
                f"the batch of step {self._step} is of {batch.shape[0]} rows of {batch.shape[1]} tokens; expected "
                f"{self._shape[0]} of {self._shape[1]} (training.global-batch-size of all data-parallel ranks, "
                "training.sequence-length)"
            )
        return batch

    def state_dict(self) -> State:
        """The steps taken, and the iterable's own state where it has one; ValueError where that is no JSON."""
        own = {self._rank: self._source.state_dict()} if self._has_state() else {}
        try:
            json.dumps(own)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"state_dict() of a {type(self._source).__name__} holds what a checkpoint cannot keep: {error}; "
                "expected numbers, strings, lists and dictionaries of them"
            ) from error
        return {"identity": dict(self._identity), "step": self._step, "lanes": own}

    def load_state_dict(self, state: State) -> None:
        """Go on from there. Raises as `check_state`, and for batches that have no state."""
        check_state(self._identity, state)
        if not self._has_state() or self._rank not in state["lanes"]:
            raise ValueError(
                f"the run stopped after step {state['step']}, and a {type(self._source).__name__} cannot go on from "
                "there: it needs state_dict and load_state_dict, now and when it was saved. Give batches that have "
                "both, or start a new run in another output directory"
            )
        self._source.load_state_dict(state["lanes"][self._rank])
        self._iterator, self._step = None, state["step"]

    def close(self) -> None:
        """Nothing to close: the batches are the caller's."""

    def _has_state(self) -> bool:
        return hasattr(self._source, "state_dict") and hasattr(self._source, "load_state_dict")
