"""Joining the processes that torchrun started, and leaving them so that whoever reads the log knows why.

Each process notes the step it is at in the store they share. When a collective fails, one of those that waited looks
there for who is missing, and says it; when a process fails by itself, it alone speaks and the others leave in silence.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from sightline.config import ParallelConfig
from sightline.errors import AnotherRankEnded, LostRank, exit_code_of
from sightline.parallel.mesh import AXES, resolve

GRACE = 2.0
"""Seconds in which all that wait for the same process have found out that it does not come."""
PRECEDENCE = 3.0
"""Seconds that rank 0 has to be the first to say what all processes would."""


class Job:
    """All processes of a run as one of them sees them, through a store they share."""

    def __init__(self, store: dist.Store, parallel: ParallelConfig, rank: int, world: int) -> None:
        self.store, self.parallel, self.rank, self.world = store, parallel, rank, world
        self.step = 0

    def record_step(self, step: int) -> None:
        """Tell the others where this process is."""
        self.step = step
        self.store.set(f"step/{self.rank}", str(step))

    def claim_report(self) -> bool:
        """Whether this process is the one to say why the job ends.

        Where all fail alike (a wrong degree, SIGTERM) it is rank 0, which the others give time.
        """
        if self.rank > 0:
            with contextlib.suppress(dist.DistStoreError):  # that the time is over
                self.store.wait(["speaker"], timedelta(seconds=PRECEDENCE))
        mine = str(self.rank)
        return self.store.compare_set("speaker", "", mine).decode() == mine

    def diagnose_hang(self) -> LostRank | None:
        """Called by all whose collective failed; one of them returns what to say.

        Whoever waits too says so within GRACE seconds. The process that does not is the one they wait for: it sleeps,
        works on, or is gone.
        """
        self.store.set(f"waits/{self.rank}", "")
        if not self.claim_report():
            # The store may live in this process, and the speaker reads it.
            self.store.wait(["spoken"], timedelta(seconds=5 * GRACE))
            return None
        time.sleep(GRACE)
        missing = [rank for rank in range(self.world) if not self.store.check([f"waits/{rank}"])]
        self.store.set("spoken", "")
        if not missing:
            return LostRank(
                f"processes lost each other at step {self.step}, all {self.world} of them are there: look at the "
                f"network between the machines, or give a slow step more than --parallel.timeout "
                f"{self.parallel.timeout} s"
            )
        late = ", ".join(self._whereabouts(rank) for rank in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        return LostRank(
            f"{late}{more}; {self._named(self.rank)} waits at step {self.step} and has given up "
            f"(--parallel.timeout {self.parallel.timeout} s, or the connection was cut)"
        )

    def _whereabouts(self, rank: int) -> str:
        noted = f"step/{rank}"
        where = f"at step {self.store.get(noted).decode()}" if self.store.check([noted]) else "before its first step"
        return f"{self._named(rank)} is {where}"

    def _named(self, rank: int) -> str:
        return f"rank {rank}{rank_label(self.parallel, rank, self.world)}"


_job: Job | None = None  # as torch.distributed keeps its process group: a process is part of at most one


@contextlib.contextmanager
def distributed_session(parallel: ParallelConfig, device: torch.device) -> Iterator[torch.device]:
    """While the block runs, this process is one of those torchrun started; gives the device that is its own.

    Without torchrun there is one process: nothing is started, and `device` comes back.

    Errors: ValueError for more processes than GPUs on a machine, or degrees that do not fit the processes. Inside the
    block, where several processes end by an error: one keeps its error, in the others AnotherRankEnded takes its place;
    LostRank for a process that did not come.
    """
    global _job
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    timeout = timedelta(seconds=parallel.timeout)
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _job = Job(dist.PrefixStore(f"sightline/{attempt}", store), parallel, rank, world)
    lost_gpus = False
    try:
        resolve(parallel, world)
        device = local_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        yield device
    except (Exception, KeyboardInterrupt) as error:
        lost_gpus = device.type == "cuda"  # nccl would wait for collectives that never end: they go with the process
        why = _why(_job, error)
        if why is error:
            raise
        raise why from error
    finally:
        _job = None
        if dist.is_initialized() and not lost_gpus:
            dist.destroy_process_group()


def sync_stop_signal(step: int, signal: int | None) -> int | None:
    """Between two steps: note the step, and learn of a signal that any process has received, so that all stop alike.

    One integer summed up on the CPU; with one process, nothing.
    """
    if _job is None:
        return signal
    _job.record_step(step)
    received = torch.tensor(signal or 0)
    dist.all_reduce(received, dist.ReduceOp.MAX)
    return int(received) or None


def local_device(device: torch.device) -> torch.device:
    """This process's GPU of the machine's, or its share of the CPU's cores where OMP_NUM_THREADS does not say more."""
    local, processes = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if device.type != "cuda":
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
        return device
    found = torch.cuda.device_count()
    if processes > found:
        raise ValueError(
            f"{processes} processes were started on a machine with {found} GPUs; expected at most one for each. Use "
            f"torchrun --nproc-per-node {found}"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def rank_label(parallel: ParallelConfig, rank: int, world: int) -> str:
    """Where a rank stands along each axis that has more than one process: ` (pipeline 1, shard 0)`, or nothing."""
    parallel = resolve(parallel, world)
    sizes = [getattr(parallel, axis) for axis in AXES]
    at = [rank // math.prod(sizes[i + 1 :]) % size for i, size in enumerate(sizes)]
    named = [f"{axis} {index}" for axis, size, index in zip(AXES, sizes, at, strict=True) if size > 1]
    return f" ({', '.join(named)})" if named else ""


def _why(job: Job, error: BaseException) -> BaseException:
    """What this process leaves with. What it says itself carries its rank as a note."""
    said: BaseException | None = None
    try:
        # A collective failed: gloo raises a plain RuntimeError, with the path of its source in the text.
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error)):
            said = job.diagnose_hang()
        elif job.claim_report():
            job.store.set("spoken", "")
            said = error
    except dist.DistError:
        pass  # the store went with the process that held it, which has said why, or was killed
    if said is None:
        return AnotherRankEnded(exit_code_of(error))
    said.add_note(f"rank {job.rank}")
    return said
