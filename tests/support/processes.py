"""Functions on several processes joined by gloo, as torchrun would start them."""

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

# The server imports torch and the models once; every process is a fork of it and starts in milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.pipelining", "sightline.models"])


def on_processes(
    world: int, function: Callable[..., Any], *args: Any, join: bool = True, timeout: float = 300
) -> list[Any]:
    """function(rank, *args) in `world` processes; what each returned, by rank.

    Without `join` they are what torchrun leaves them: told of each other, not joined yet.

    `function` stands at the top of a test file, args and results can be pickled. A process that raises fails the test
    with its traceback; the others are ended.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results: Any = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=_run, args=(rank, world, port, join and world > 1, function, args, results), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    returned: dict[int, Any] = {}
    try:
        while len(returned) < world:
            try:
                rank, value, error = results.get(timeout=timeout)
            except queue.Empty:
                missing = sorted(set(range(world)) - set(returned))
                raise TimeoutError(f"ranks {missing} did not return within {timeout} s") from None
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            returned[rank] = torch.load(io.BytesIO(value), weights_only=False)
    finally:
        for process in processes:
            process.join(timeout=10 if len(returned) == world else 0)
            if process.is_alive():
                process.kill()
    return [returned[rank] for rank in range(world)]


def _run(
    rank: int, world: int, port: int, join: bool, function: Callable[..., Any], args: tuple[Any, ...], results: Any
) -> None:
    # What torchrun sets.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    try:
        if join:
            dist.init_process_group("gloo")
        value = function(rank, *args)
        written = io.BytesIO()  # bytes, since a tensor in a queue lives only as long as the process that sent it
        torch.save(value, written)
        results.put((rank, written.getvalue(), None))
        if join:
            dist.barrier()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
