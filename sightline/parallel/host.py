"""Exchange of small values between all ranks on the host, through the store of the job.

Each rank has one connection, to the store. A process group of gloo would connect every pair of ranks, which a job with
GPUs needs for nothing else.
"""

from __future__ import annotations

import itertools
import os
import pickle
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch.distributed as dist

from sightline.parallel.torch_private import default_store

T = TypeVar("T")
POLL = 1.0
"""Seconds between two questions whether the first rank of each machine is done."""
_created = itertools.count()


class HostGroup:
    """All ranks of the job, or the only process. All ranks make the same calls in the same order.

    All ranks create their instances in the same order.

    alone       this process only, even if it is one of several ranks
    for_thread  use a connection of its own, so that a thread may wait while the main thread uses the store
    """

    def __init__(self, *, alone: bool = False, for_thread: bool = False) -> None:
        several = dist.is_initialized() and not alone
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self._calls = 0
        self._read_by_all: list[str] = []
        """Keys that no rank needs once all ranks have made the next `gather`."""
        if self.world > 1:
            store = default_store().clone() if for_thread else default_store()  # type: ignore[attr-defined]
            self._store = dist.PrefixStore(f"host/{next(_created)}", store)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks by rank on rank 0, and an empty list on the others."""
        if self.world == 1:
            return [value]
        call = self._next_call()
        if self.rank > 0:
            self._store.set(f"{call}/{self.rank}", pickle.dumps(value))  # type: ignore[arg-type]
            return []
        keys = [f"{call}/{rank}" for rank in range(1, self.world)]
        self._store.wait(keys)
        values = [value, *map(pickle.loads, self._store.multi_get(keys))]
        for key in [*keys, *self._read_by_all]:
            self._store.delete_key(key)
        self._read_by_all = []
        return values

    def broadcast(self, value: Any = None) -> Any:
        """Return the value of rank 0 on every rank."""
        if self.world == 1:
            return value
        call = self._next_call()
        if self.rank > 0:
            return pickle.loads(self._store.get(call))
        self._store.set(call, pickle.dumps(value))  # type: ignore[arg-type]
        self._read_by_all.append(call)
        return value

    def scatter(self, values: Sequence[Any]) -> Any:
        """Return the value of this rank out of those that rank 0 passes, one per rank; other ranks pass anything."""
        if self.world == 1:
            return values[0]
        call = self._next_call()
        if self.rank > 0:
            value = pickle.loads(self._store.get(f"{call}/{self.rank}"))
            self._store.delete_key(f"{call}/{self.rank}")
            return value
        for rank in range(1, self.world):
            self._store.set(f"{call}/{rank}", pickle.dumps(values[rank]))  # type: ignore[arg-type]
        return values[0]

    def from_rank_zero(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 alone; return its result, or raise its error, on every rank."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = make()
            except Exception as raised:
                error = raised
        result, error = self.broadcast((result, error))
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def first_of_each_machine(self, make: Callable[[], T]) -> T:
        """Call `make` on the first rank of each machine, then on all other ranks, and return the result of this rank.

        It is for work whose result stays on disk, so that the other ranks of a machine only read it. It may take longer
        than the timeout of a collective: the ranks ask each other every second whether it is done. An error on a first
        rank is raised on every rank.
        """
        if self.world == 1:
            return make()
        first = os.environ["LOCAL_RANK"] == "0"
        made: Future[T | None] = Future()
        if first:
            threading.Thread(target=_run, args=(make, made), daemon=True).start()  # daemon: Ctrl-C does not wait for it
        else:
            made.set_result(None)
        done = False
        while not done:
            wait([made], timeout=POLL)
            reports = self.gather((made.done(), made.exception() if made.done() else None))
            failure = next((error for _, error in reports if error is not None), None)
            done, failure = self.broadcast((all(finished for finished, _ in reports), failure))
            if failure is not None:
                raise failure
        return made.result() if first else make()  # type: ignore[return-value]

    def first_error(self, error: Exception | None) -> tuple[int, Exception] | None:
        """Return the lowest rank that passed an error, and its error, on every rank; None if all ranks passed None."""
        errors = enumerate(self.gather(error))
        return self.broadcast(next(((rank, error) for rank, error in errors if error is not None), None))

    def barrier(self) -> None:
        """Return when all ranks have called this."""
        self.gather(None)
        self.broadcast()

    def _next_call(self) -> str:
        self._calls += 1
        return str(self._calls)


def _run(make: Callable[[], Any], made: Future[Any]) -> None:
    """Store the result of `make` or its error."""
    try:
        made.set_result(make())
    except BaseException as error:
        made.set_exception(error)
