"""Exchange of small values between all ranks on the host, through the store of the job.

Each rank has one connection, to the store. A process group of gloo would connect every pair of ranks, which a job with
GPUs needs for nothing else.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from sightline.parallel.torch_private import default_store

T = TypeVar("T")
_created = itertools.count()


class HostGroup:
    """All ranks of the job, or the only process. All ranks make the same calls in the same order.

    Each instance has a connection of its own, so that a thread may wait in one while the main thread uses another. All
    ranks create their instances in the same order.

    alone  this process only, even if it is one of several ranks
    """

    def __init__(self, *, alone: bool = False) -> None:
        several = dist.is_initialized() and not alone
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self._calls = 0
        self._read_by_all: list[str] = []
        """Keys that no rank needs once all ranks have made the next `gather`."""
        if self.world > 1:
            self._store = dist.PrefixStore(f"host/{next(_created)}", default_store().clone())  # type: ignore[attr-defined]

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
