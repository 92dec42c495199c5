"""Shared by the benchmarks: timing of contestants in turn in one run, and rows of documents with realistic lengths."""

from __future__ import annotations

import json
import multiprocessing
import platform
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from sightline.batch import IGNORE, Batch

RESULTS = Path(__file__).parent / "results"


def in_turn(
    contestants: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each contestant. They run A B C A B C ..., so that noise of the machine affects all alike.

    clock  returns seconds; `time.process_time` leaves out the time that other processes take from one thread
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for lap in range(rounds + 1):
        for name, run in contestants.items():
            _wait()
            begin = clock()
            run()
            _wait()
            if lap > 0:  # the first lap is warm-up
                times[name].append(clock() - begin)
    return {name: sorted(values)[len(values) // 2] for name, values in times.items()}


def processes_in_turn(
    makers: dict[str, tuple[Callable[..., Callable[[], object]], tuple[object, ...]]], rounds: int
) -> dict[str, tuple[float, float]]:
    """Median seconds and peak MiB of each contestant, as `in_turn` with each contestant in a separate process.

    The state of one process (allocator, threads, caches) does not affect the others, and its memory is measured alone.

    makers  name -> (function that builds the contestant, its arguments); both must be picklable
    """
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for name, (maker, arguments) in makers.items():
        here, there = context.Pipe()
        context.Process(target=_contestant, args=(there, maker, arguments), daemon=True).start()
        pipes[name] = here
    for pipe in pipes.values():
        assert pipe.recv() == "ready"
    times: dict[str, list[float]] = {name: [] for name in makers}
    for lap in range(rounds + 2):
        for name, pipe in pipes.items():
            pipe.send("run")
            seconds = pipe.recv()
            if lap > 1:  # the first laps are warm-up
                times[name].append(seconds)
    results = {}
    for name, pipe in pipes.items():
        pipe.send("end")
        results[name] = sorted(times[name])[rounds // 2], pipe.recv()
    return results


def _contestant(pipe: Connection, maker: Callable[..., Callable[[], object]], arguments: tuple[object, ...]) -> None:
    run = maker(*arguments)
    pipe.send("ready")
    while pipe.recv() == "run":
        begin = time.perf_counter()
        run()
        pipe.send(time.perf_counter() - begin)
    pipe.send(peak_mib())


def peak_mib() -> float:
    """Peak memory of this process in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss of a new process starts at the peak of its parent
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gemm() -> Callable[[], Tensor]:
    """Return a contestant that computes a float32 matrix product of GEMM_FLOPS = 2 * 1024^3 FLOPs."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return lambda: a @ b


GEMM_FLOPS = 2 * 1024**3


def lognormal_documents(length: int, rows: int = 1, *, median: float = 300.0, seed: int = 0) -> Tensor:
    """Document ids int32 [rows, length] of documents with lognormal lengths (sigma 1); the last of a row is cut off."""
    generator = torch.Generator().manual_seed(seed)
    packed = []
    for _ in range(rows):
        lengths = (torch.randn(length, generator=generator) + torch.tensor(median).log()).exp().long().clamp(min=1)
        packed.append(torch.repeat_interleave(torch.arange(length), lengths)[:length])
    return torch.stack(packed).to(torch.int32)


def even_documents(length: int, count: int) -> Tensor:
    """Document ids int32 [1, length] of `count` documents of equal length."""
    return (torch.arange(length) * count // length).to(torch.int32).unsqueeze(0)


def positions_of(document_ids: Tensor) -> Tensor:
    """Position of each token inside its document: int32 [B, S]."""
    index = torch.arange(document_ids.shape[1]).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return (index - index.masked_fill(~starts, 0).cummax(dim=1).values).to(torch.int32)


def packed_rows(length: int, vocabulary: int, seed: int, rows: int = 1) -> Batch:
    """Batch of random tokens in lognormal documents of median 300."""
    ids = lognormal_documents(length, rows, seed=seed)
    tokens = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = torch.full_like(tokens, IGNORE)
    labels[:, :-1] = torch.where(ids[:, 1:] == ids[:, :-1], tokens[:, 1:], IGNORE)
    return Batch(tokens=tokens, labels=labels, document_ids=ids, positions=positions_of(ids))


def machine() -> str:
    """Processor, threads and torch version, for the title of a table."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} {torch.get_num_threads()} threads, torch {torch.__version__}"


def save(name: str, rows: list[dict[str, object]]) -> None:
    """Write the measurements of a benchmark to results/NAME.json beside the code."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
