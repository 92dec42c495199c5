"""Distributed sessions: startup, a common stop signal, and one error message for all ranks."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import pytest
import torch
import torch.distributed as dist

from sightline.config import ParallelConfig
from sightline.errors import AnotherRankEnded, LostRank, exit_code_of
from sightline.parallel import launch
from sightline.parallel.launch import (
    Job,
    agree_on_start,
    distributed_session,
    rank_label,
    record_step,
    wait_for_device,
)
from sightline.parallel.mesh import Mesh
from sightline.training.step import StepSums
from tests.support.processes import CONTEXT, run_on_ranks

CPU = torch.device("cpu")


def run_ranks(world: int, body: Callable[[int], object], parallel: ParallelConfig, stopped: int = -1) -> list[object]:
    """Run `body(rank)` inside `distributed_session`; return each rank's result or error, or "dead" if it died.

    stopped  a rank that stops itself by SIGSTOP, of which there is no result
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(world)]
    processes = [
        CONTEXT.Process(target=_start, args=(rank, world, port, body, parallel, pipe[1]), daemon=True)
        for rank, pipe in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    try:
        return [
            receive(pipe, process)
            for rank, ((pipe, _), process) in enumerate(zip(pipes, processes, strict=True))
            if rank != stopped
        ]
    finally:
        for process in processes:
            process.kill()


def receive(pipe: Connection, process: BaseProcess) -> object:
    deadline = time.monotonic() + 120
    while not pipe.poll(0.05):
        assert time.monotonic() < deadline
        if not process.is_alive():
            return "dead"
    return pipe.recv()


def _start(rank: int, world: int, port: int, body: Callable[[int], object], parallel: ParallelConfig, pipe) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    try:
        with distributed_session(parallel, CPU):
            value = body(rank)
        assert not dist.is_initialized()
        pipe.send(value)
    except BaseException as error:
        assert not dist.is_initialized()
        pipe.send((type(error).__name__, str(error), getattr(error, "__notes__", []), exit_code_of(error)))
    time.sleep(20)  # rank 0 hosts the store until all ranks have exited


def test_one_process_has_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed_session(ParallelConfig(tensor=4), CPU) as device:  # Mesh checks the degrees
        assert device == CPU and not dist.is_initialized()
        record_step(7)


def sum_of_ranks(rank: int) -> object:
    value = torch.tensor(rank)
    dist.all_reduce(value)
    return int(value), Mesh(ParallelConfig(tensor=2), CPU).index("tensor"), torch.get_num_threads() > 0


def test_session_of_two_ranks() -> None:
    assert run_ranks(2, sum_of_ranks, ParallelConfig(tensor=2)) == [(1, 0, True), (1, 1, True)]


def count_stop_requests(rank: int) -> list[float]:
    mesh = Mesh(ParallelConfig(shard=2, tensor=2), CPU)
    counts = dict.fromkeys(("visible_pairs", "attention_flops", "tokens", "padded_tokens"), 1.0)
    return [
        StepSums.of_all_processes(mesh, torch.ones(()), stop_requested=rank == asks, **counts).read()["stop_requests"]
        for asks in range(5)
    ]


def test_all_ranks_read_the_stop_request_of_any_rank() -> None:
    assert run_on_ranks(4, count_stop_requests) == [[1.0, 1.0, 1.0, 1.0, 0.0]] * 4


def meet(step: int) -> None:
    record_step(step)
    dist.all_reduce(torch.ones(1))


def fail_on_rank_1(rank: int) -> object:
    meet(1)
    if rank == 1:
        raise FileNotFoundError("no such file")
    meet(2)


def test_only_the_failing_rank_reports_an_error() -> None:
    results = run_ranks(3, fail_on_rank_1, ParallelConfig())
    assert results[1] == ("FileNotFoundError", "no such file", ["rank 1"], 1)
    assert results[0] == results[2] == ("AnotherRankEnded", "", [], 1)


def fail_on_all_ranks(rank: int) -> object:
    raise ValueError("a wrong option")


def test_rank_0_reports_an_error_of_all_ranks() -> None:
    results = run_ranks(2, fail_on_all_ranks, ParallelConfig())
    assert results == [("ValueError", "a wrong option", ["rank 0"], 2), ("AnotherRankEnded", "", [], 2)]


def test_invalid_degrees_are_reported_once() -> None:
    results = run_ranks(2, sum_of_ranks, ParallelConfig(tensor=3))
    assert results[0][0] == "ValueError" and "does not divide the 2 processes" in results[0][1]  # type: ignore[index]
    assert results[1] == ("AnotherRankEnded", "", [], 2)


def sleep_before_step_2(rank: int) -> object:
    meet(1)
    if rank == 2:
        time.sleep(11)
    meet(2)
    return None


def sleep_inside_step_1(rank: int) -> object:
    mesh = Mesh(ParallelConfig(pipeline=2, shard=2, timeout=3), CPU)
    meet(1)
    if rank == 2:
        time.sleep(11)
    mesh.all_reduce(mesh.all_reduce(torch.ones(3), "pipeline"), "shard")
    return None


@pytest.mark.parametrize(("body", "waiting_step"), [(sleep_before_step_2, 2), (sleep_inside_step_1, 1)])
def test_missing_rank_is_named_once(body: Callable[[int], object], waiting_step: int) -> None:
    results = run_ranks(4, body, ParallelConfig(pipeline=2, shard=2, timeout=3))
    lost = [error for error in results if error[0] == "LostRank"]  # type: ignore[index]
    assert len(lost) == 1 and sum(error[0] == "AnotherRankEnded" for error in results) == 3  # type: ignore[index]
    assert lost[0][1].startswith("rank 2 (pipeline 1, shard 0) was last at step 1; rank ")  # type: ignore[index]
    assert f"waits at step {waiting_step} and has given up (--parallel.timeout 3 s" in lost[0][1]  # type: ignore[index]


def die(rank: int) -> object:
    meet(1)
    if rank == 1:
        os._exit(1)
    meet(2)


def test_dead_rank_is_named() -> None:
    results = run_ranks(2, die, ParallelConfig())
    assert results[1] == "dead"
    assert results[0][0] == "LostRank"  # type: ignore[index]
    assert results[0][1].startswith("rank 1 (shard 1) was last at step 1; rank 0 (shard 0) waits at step 2")  # type: ignore[index]


def stop_rank_0(rank: int) -> object:
    meet(1)
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.all_reduce(torch.ones(3))
    return None


def test_stopped_rank_that_hosts_the_store_is_named() -> None:
    lost, other = run_ranks(3, stop_rank_0, ParallelConfig(timeout=2), stopped=0)
    assert lost[0] == "LostRank" and lost[2] == ["rank 1"]  # type: ignore[index]
    assert lost[1].startswith("rank 0 (shard 0), which hosts the store of the job, does not answer; rank 1")  # type: ignore[index]
    assert other == ("AnotherRankEnded", "", [], 1)


class UnfinishedEvent:
    """A CUDA event after which a collective never ends."""

    def record(self) -> None: ...

    def query(self) -> bool:
        return False


def test_a_collective_on_a_gpu_that_never_ends_fails_after_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "Event", UnfinishedEvent)
    wait_for_device(gpu)  # one process waits for no other
    monkeypatch.setattr(launch, "_job", Job(dist.HashStore(), ParallelConfig(timeout=1), 0, 2))
    wait_for_device(CPU)
    with pytest.raises(dist.DistBackendError, match="does not end"):
        wait_for_device(gpu)


def agree(store: dist.Store, world: int, ranks: set[int], timeout: float = 20) -> list[object]:
    """Call `agree_on_start` on these ranks, on rank 0 last; return their names or errors, and None for other ranks."""
    results: list[object] = [None] * world

    def join(rank: int) -> None:
        try:
            results[rank] = agree_on_start(store, rank, world, timeout)
        except Exception as error:
            results[rank] = str(error) if isinstance(error, LostRank) else error

    threads = [threading.Thread(target=join, args=(rank,)) for rank in ranks - {0}]
    for thread in threads:
        thread.start()
    time.sleep(0.2)  # the other ranks find the name of the earlier start
    if 0 in ranks:
        join(0)
    for thread in threads:
        thread.join()
    return results


def test_every_start_gets_its_own_name() -> None:
    store = dist.HashStore()
    first, second = agree(store, 3, {0, 1, 2}), agree(store, 3, {0, 1, 2})
    assert len(set(first)) == len(set(second)) == 1 and first[0] != second[0]
    assert isinstance(first[0], str)


def test_ranks_that_do_not_start_are_named_once() -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1))
    zero, one, two, three = agree(store, 4, {0, 1}, timeout=1)
    assert str(zero).startswith("2 of 4 ranks did not start within 1 s (--parallel.timeout): rank 2, 3. Check")
    assert isinstance(one, AnotherRankEnded) and two is three is None
    missing = agree(store, 3, {1}, timeout=1)
    assert str(missing[1]).startswith("rank 0 did not start within 1 s")


def test_rank_label() -> None:
    degrees = ParallelConfig(pipeline=2, context=2, tensor=2)
    assert rank_label(degrees, 0, 8) == " (pipeline 0, context 0, tensor 0)"
    assert rank_label(degrees, 6, 8) == " (pipeline 1, context 1, tensor 0)"
    assert rank_label(ParallelConfig(), 3, 4) == " (shard 3)" and rank_label(ParallelConfig(), 0, 1) == ""


def test_exit_codes() -> None:
    codes = [exit_code_of(error) for error in (ValueError(), RuntimeError(), LostRank(), AnotherRankEnded(143))]
    assert codes == [2, 1, 1, 143]
