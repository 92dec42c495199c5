"""Run functions on several local processes with gloo, with the environment that torchrun sets."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import queue
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# The fork server imports what is slow once, so each process, a fork of it, starts in milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["torch.distributed.fsdp", "torch.distributed.pipelining", "sightline.models", "sightline.hf"]
CONTEXT.set_forkserver_preload([*PRELOADED, "transformers.trainer"])


def run_on_ranks(
    world: int, function: Callable[..., Any], *args: Any, join: bool = True, timeout: float = 300
) -> list[Any]:
    """Run `function(rank, *args)` in `world` processes and return their results, ordered by rank.

    `function` must be defined at module level, args and results must be picklable. If a process raises, the test fails
    with its traceback, and the other processes are killed.

    join  initialize the process group; otherwise only the environment variables are set, as after torchrun
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results: Any = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=_run, args=(rank, world, port, join and world > 1, function, args, results), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    results_by_rank: dict[int, Any] = {}
    try:
        while len(results_by_rank) < world:
            try:
                rank, value, error = results.get(timeout=timeout)
            except queue.Empty:
                missing = sorted(set(range(world)) - set(results_by_rank))
                raise TimeoutError(f"ranks {missing} did not return within {timeout} s") from None
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            results_by_rank[rank] = torch.load(io.BytesIO(value), weights_only=False)
    finally:
        for process in processes:
            process.join(timeout=10 if len(results_by_rank) == world else 0)
            if process.is_alive():
                process.kill()
    return [results_by_rank[rank] for rank in range(world)]


def _run(
    rank: int, world: int, port: int, join: bool, function: Callable[..., Any], args: tuple[Any, ...], results: Any
) -> None:
    # The environment variables that torchrun sets.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    try:
        if join:
            dist.init_process_group("gloo")
        value = function(rank, *args)
        buffer = io.BytesIO()  # bytes, since a tensor in a queue is lost when the sending process exits
        torch.save(value, buffer)
        results.put((rank, buffer.getvalue(), None))
        if join:
            dist.barrier()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
