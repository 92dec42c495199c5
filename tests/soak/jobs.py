"""Jobs of the soak: the ranks of one run, started and restarted by a fork server or by torchrun."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.soak.rank import start_forked

TIMEOUT = 6
"""Seconds of --parallel.timeout."""
LATEST_END = TIMEOUT + 10
"""Seconds within which all ranks must have ended after one of them ended or stopped."""
MAX_RESTARTS = 20
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.soak.rank", "sightline.cli.train", "torch.distributed.fsdp"])


@dataclass(frozen=True)
class Launch:
    """A training command and its number of processes. `start` may be called again and again."""

    arguments: list[str]
    world: int
    record: Path
    log: Path

    def environment(self) -> dict[str, str]:
        return {"SOAK_RECORD": str(self.record), "OMP_NUM_THREADS": "1"}


class ForkedJob:
    """Ranks forked from a process that has imported everything, in the environment that static torchrun sets.

    This process hosts the store, as the agent of torchrun does: one store for all restarts. `start` is a restart.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.starts = 0
        self.processes: list[Any] = []
        self.failed_at = 0.0
        self.late = ""
        """Description of ranks that did not end in time."""
        self.stopped: int | None = None
        """Rank that was stopped, which is killed when all others have ended."""
        if launch.world > 1:
            self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))

    def start(self) -> None:
        world = self.launch.world
        common = self.launch.environment()
        if world > 1:
            common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
            common |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(self.starts)}
        self.processes = []
        for rank in range(world):
            environment = common | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
            arguments = (environment, self.launch.arguments, self.launch.log)
            self.processes.append(CONTEXT.Process(target=start_forked, args=arguments, daemon=True))
            self.processes[-1].start()
        self.starts += 1
        self.failed_at, self.stopped = 0.0, None

    def pid(self, rank: int) -> int | None:
        process = self.processes[rank]
        return process.pid if process.is_alive() else None

    def returncode(self) -> int | None:
        """Return the exit code of the job, or None while a rank is alive. Ends the others when a rank has failed."""
        codes = [process.exitcode for process in self.processes]
        failed = [code for code in codes if code]
        if not failed or None not in codes:
            return None if None in codes else (failed or [0])[0]
        if not self.failed_at:
            self.failed_at = time.monotonic()
            self.signal_all(signal.SIGTERM)
        elif self.stopped is not None and codes.count(None) == 1:
            self.kill()
        elif time.monotonic() > self.failed_at + LATEST_END:
            alive = [rank for rank, code in enumerate(codes) if code is None]
            self.late = f"ranks {alive} were alive {LATEST_END} s after another rank had ended"
            self.kill()
        return None

    def signal_all(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, number)

    def kill(self) -> None:
        """Kill all ranks."""
        self.signal_all(signal.SIGKILL)
        for process in self.processes:
            process.join()


class TorchrunJob:
    """Ranks started by torchrun in its static form, which restarts them. It ends a stopped rank after 30 seconds."""

    late = ""
    stopped: int | None = None

    def __init__(self, launch: Launch) -> None:
        self.launch = launch

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.launch.world)]
        torchrun += ["--master-port", str(port), "--max-restarts", str(MAX_RESTARTS), "--monitor-interval", "0.1"]
        with self.launch.log.open("a") as log:
            self.agent = subprocess.Popen(
                [*torchrun, "-m", "tests.soak.rank", *self.launch.arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.launch.environment()},
            )

    def pid(self, rank: int) -> int | None:
        """Return the process id of a rank: the child of torchrun with this RANK in its environment."""
        for child in self._children():
            if f"RANK={rank}".encode() in _read(f"/proc/{child}/environ").split(b"\0"):
                return child
        return None

    def returncode(self) -> int | None:
        return self.agent.poll()

    def kill(self) -> None:
        """Kill torchrun and all ranks."""
        self.agent.send_signal(signal.SIGSTOP)  # no restart in between
        for child in self._children():
            os.kill(child, signal.SIGKILL)
        self.agent.kill()
        self.agent.wait()

    def _children(self) -> list[int]:
        return [int(child) for child in _read(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").split()]


Job = ForkedJob | TorchrunJob


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:  # the process has ended
        return b""
