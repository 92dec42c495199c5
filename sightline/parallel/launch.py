"""Distributed sessions under torchrun, which end with one error message that names the cause.

Each rank records its step in the shared store. When a collective fails, one of the waiting ranks reads the store and
reports which rank is missing. When a rank fails by itself, it reports its error and the other ranks exit silently.

torchrun keeps the store when it restarts the processes, with the addresses of the dead ones in it. Therefore the ranks
first agree on a name for this start of the job, and all their keys begin with it.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from sightline.config import ParallelConfig
from sightline.errors import AnotherRankEnded, LostRank, exit_code_of
from sightline.parallel.mesh import AXES, collective_timeout, resolve

GRACE = 2.0
"""Seconds within which all ranks that wait for the same rank notice that their collective has failed."""
PRECEDENCE = 3.0
"""Seconds that the other ranks wait for rank 0 to report an error that all ranks may have."""
STORE_DEADLINE = GRACE + PRECEDENCE + 2.0
"""Seconds after which a store that does not answer is considered lost: longer than any report takes."""


class Job:
    """One rank's view of all ranks of a run, through their shared store."""

    def __init__(self, store: dist.Store, parallel: ParallelConfig, rank: int, world: int) -> None:
        self.store, self.parallel, self.rank, self.world = store, parallel, rank, world
        self.step = 0
        self._recorded = -math.inf
        store.set(f"process/{rank}", f"{socket.gethostname()} {os.getpid()}")

    def record_step(self, step: int) -> None:
        """Record this rank's step where the other ranks can read it, at most once a second: one store serves all."""
        self.step = step
        if time.monotonic() - self._recorded > 1.0:
            self.store.set(f"step/{self.rank}", str(step))
            self._recorded = time.monotonic()

    def claim_report(self) -> bool:
        """Return whether this rank is the one to report why the job ends.

        If all ranks fail alike (a wrong degree, SIGTERM), it is rank 0: the others wait for it first.
        """
        if self.rank > 0:
            with contextlib.suppress(dist.DistStoreError):  # the wait timed out
                self.store.wait(["reporter"], timedelta(seconds=PRECEDENCE))
        rank = str(self.rank)
        return self.store.compare_set("reporter", "", rank).decode() == rank

    def diagnose_hang(self) -> LostRank | None:
        """Return the error to report, on one of the ranks that call this because their collective failed; else None.

        Every waiting rank registers within GRACE seconds. A rank that does not is the missing one: it sleeps, still
        computes, or is dead.
        """
        self.store.set(f"waiting/{self.rank}", "")
        if not self.claim_report():
            # This process may host the store, which the reporting rank still reads.
            self.store.wait(["reported"], timedelta(seconds=5 * GRACE))
            self._wake([int(rank) for rank in self.store.get("reported").split()])
            return None
        time.sleep(GRACE)
        missing = [rank for rank in range(self.world) if not self.store.check([f"waiting/{rank}"])]
        self.store.set("reported", " ".join(map(str, missing)))
        self._wake(missing)
        if not missing:
            return LostRank(
                f"a collective failed at step {self.step} although all {self.world} ranks are alive: check the network "
                f"between the machines, or raise --parallel.timeout above {self.parallel.timeout} s for slow steps"
            )
        late = ", ".join(self._describe_step(rank) for rank in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        return LostRank(
            f"{late}{more}; {self._describe_rank(self.rank)} waits at step {self.step} and has given up "
            f"(--parallel.timeout {self.parallel.timeout} s, or the connection was lost)"
        )

    def _wake(self, missing: list[int]) -> None:
        """Continue those of the missing ranks on this machine that a signal has stopped.

        They end then, because their collective has failed. A stopped process does not react to torchrun's SIGTERM, and
        torchrun would wait 30 seconds before it kills it.
        """
        for rank in missing:
            host, pid = self.store.get(f"process/{rank}").decode().rsplit(" ", 1)
            if host == socket.gethostname():
                with contextlib.suppress(OSError):  # it is dead
                    os.kill(int(pid), signal.SIGCONT)

    def lost_store(self) -> LostRank | None:
        """Return the error to report if the store does not answer: on one rank, since the ranks cannot coordinate."""
        by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if self.rank != (0 if by_agent else 1):
            return None
        host = "torchrun" if by_agent else self._describe_rank(0)
        return LostRank(
            f"{host}, which hosts the store of the job, does not answer; {self._describe_rank(self.rank)} is at step "
            f"{self.step} and has given up (--parallel.timeout {self.parallel.timeout} s, or the connection was lost)"
        )

    def _describe_step(self, rank: int) -> str:
        name, key = self._describe_rank(rank), f"step/{rank}"
        if not self.store.check([key]):
            return f"{name} is before its first step"
        return f"{name} was last at step {self.store.get(key).decode()}"

    def _describe_rank(self, rank: int) -> str:
        return f"rank {rank}{rank_label(self.parallel, rank, self.world)}"


_job: Job | None = None  # global like the default process group of torch.distributed: one per process


@contextlib.contextmanager
def distributed_session(parallel: ParallelConfig, device: torch.device) -> Iterator[torch.device]:
    """Context of a torch.distributed process group under torchrun; yields this rank's device.

    Without torchrun there is one process: no process group is created, and `device` is yielded unchanged.

    An error inside the block is raised on one rank; on the other ranks, AnotherRankEnded replaces it.

    Raises:
        ValueError: if a machine has more processes than GPUs, or the degrees do not multiply to the world size.
        LostRank: if the other ranks waited for a rank that did not arrive.
        AnotherRankEnded: if another rank reports why the job ends.
    """
    global _job
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    timeout = timedelta(seconds=parallel.timeout)
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    store = dist.PrefixStore("sightline", store)
    store = dist.PrefixStore(agree_on_start(store, rank, world, parallel.timeout), store)
    _job = Job(store, parallel, rank, world)
    lost_gpus = False
    try:
        resolve(parallel, world)
        device = local_device(device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        if parallel.offload:  # the optimizer exchanges gradients that are in CPU memory
            backend = "cpu:gloo,cuda:nccl"
        timeout = collective_timeout(parallel, device)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        yield device
    except (Exception, KeyboardInterrupt) as error:
        lost_gpus = device.type == "cuda"  # destroying NCCL groups would wait for collectives that never end
        reported = _error_to_raise(_job, error)
        if reported is error:
            raise
        raise reported from error
    finally:
        _job = None
        if dist.is_initialized() and not lost_gpus:
            dist.destroy_process_group()


def agree_on_start(store: dist.Store, rank: int, world: int, timeout: float) -> str:
    """Return a name for this start of the job: the same on all its ranks, and on no rank of an earlier start.

    TORCHELASTIC_RESTART_COUNT is not that name: each machine counts its own restarts. Rank 0 chooses the name. Another
    rank may read the name of an earlier start before rank 0 has replaced it; that start does not answer, so it reads
    the name again.

    Raises:
        LostRank: if a rank does not start within `timeout` seconds.
        AnotherRankEnded: if rank 0 reports that.
    """
    process = uuid.uuid4().hex
    if rank == 0:
        store.set("start", process)
        keys = [f"{process}/rank/{other}" for other in range(1, world)]
        with contextlib.suppress(dist.DistStoreError):  # the wait timed out
            store.wait(keys, timedelta(seconds=timeout))
        missing = [other for other, key in enumerate(keys, start=1) if not store.check([key])]
        for other, key in enumerate(keys, start=1):
            if other not in missing:
                store.set(f"{process}/answer/{store.get(key).decode()}", "not all" if missing else "all")
        if missing:
            raise LostRank(
                f"{len(missing)} of {world} ranks did not start within {timeout} s (--parallel.timeout): "
                f"rank {', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}. "
                "Check the log of their machine"
            )
        return process
    begin, name = time.monotonic(), ""
    # Ask now and then instead of waiting: PyTorch logs a warning for each wait that times out.
    while time.monotonic() < begin + timeout + GRACE:
        if store.check(["start"]) and store.get("start").decode() != name:
            name = store.get("start").decode()
            store.set(f"{name}/rank/{rank}", process)
        answer = f"{name}/answer/{process}"
        if store.check([answer]):
            if store.get(answer) == b"all":
                return name
            raise AnotherRankEnded(exit_code_of(LostRank()))
        time.sleep(min(1.0, 0.02 + (time.monotonic() - begin) / 20))
    raise LostRank(f"rank 0 did not start within {timeout} s (--parallel.timeout). Check the log of its machine")


def record_step(step: int) -> None:
    """Record, at most once a second, that this rank begins the step after `step`; without other ranks do nothing."""
    if _job is not None:
        _job.record_step(step)


def wait_for_device(device: torch.device) -> None:
    """Wait for a GPU, at most `parallel.timeout` seconds: a collective that waits for a lost rank never ends by itself.

    Raises:
        DistBackendError: if the GPU does not finish in time.
    """
    if _job is None or device.type != "cuda":
        return
    finished = torch.cuda.Event()
    finished.record()
    deadline = time.monotonic() + _job.parallel.timeout
    while not finished.query():
        if time.monotonic() > deadline:
            raise dist.DistBackendError("a collective on the GPU does not end")
        time.sleep(0.0005)


def local_device(device: torch.device) -> torch.device:
    """Return this rank's GPU. On a CPU, return `device` and use its share of the cores unless OMP_NUM_THREADS is set.

    Raises:
        ValueError: if the machine has fewer GPUs than processes.
    """
    local, processes = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device.type != "cuda":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
        return device
    found = torch.cuda.device_count()
    if processes > found:
        raise ValueError(
            f"{processes} processes were started on a machine with {found} GPUs; expected at most one per GPU. Use "
            f"torchrun --nproc-per-node {found}"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def rank_label(parallel: ParallelConfig, rank: int, world: int) -> str:
    """Return a rank's index along each axis above 1, ` (pipeline 1, shard 0)`; an empty string if there is none."""
    parallel = resolve(parallel, world)
    sizes = [getattr(parallel, axis) for axis in AXES]
    indices = [rank // math.prod(sizes[i + 1 :]) % size for i, size in enumerate(sizes)]
    named = [f"{axis} {index}" for axis, size, index in zip(AXES, sizes, indices, strict=True) if size > 1]
    return f" ({', '.join(named)})" if named else ""


def _error_to_raise(job: Job, error: BaseException) -> BaseException:
    """Return the error with which this rank leaves the session; a reported error has its rank as a note.

    A call of the store never returns if the process that hosts the store is stopped, so a thread makes the calls.
    """
    found: list[BaseException | None] = []
    thread = threading.Thread(target=lambda: found.append(_find_error_to_report(job, error)), daemon=True)
    thread.start()
    thread.join(STORE_DEADLINE)
    if not found:
        found.append(job.lost_store() if _is_of_collective(error) else error)
    reported = found[0]
    if reported is None:
        return AnotherRankEnded(exit_code_of(error))
    reported.add_note(f"rank {job.rank}")
    return reported


def _find_error_to_report(job: Job, error: BaseException) -> BaseException | None:
    """Return the error that this rank reports, or None if another rank reports one."""
    try:
        if _is_of_collective(error):
            return job.diagnose_hang()
        if job.claim_report():
            job.store.set("reported", "")
            return error
    except dist.DistError:
        pass  # the process that hosted the store is gone: it has reported an error or was killed
    return None


def _is_of_collective(error: BaseException) -> bool:
    """Return whether a collective failed: gloo raises a plain RuntimeError, with the path of its source in the text."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))
