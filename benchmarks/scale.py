"""Counts that grow with the number of ranks: store calls, files, sockets of a start, a step, a save and a resume.

    python -m benchmarks.scale                    2, 8, 16, 32 and 64 ranks on this machine, minutes on two cores
    python -m benchmarks.scale --ranks 8 64

Each rank is a process that runs `sightline train` on a small model, with the real store, files and loader. Only the
collectives of process groups do nothing (PyTorch's fake backend): losses mean nothing, and connections of gloo or NCCL
are not counted. This process hosts the store, as torchrun does.

Counted per rank: calls of the store and their bytes, files opened and looked up (stat, lstat) in the run directory, and
collectives. For each count, the least-squares line a + b n over the numbers of ranks is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

import torch.testing._internal.distributed.fake_pg  # isort: skip  # registers the backend

from benchmarks.timing import save
from sightline.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    Run,
    TrainingConfig,
    ValidationConfig,
)
from sightline.models import Llama3Config
from sightline.models.hf import files
from sightline.training.saver import Saver
from sightline.training.terminal import Terminal
from sightline.training.trainer import Trainer, train

STEPS = 6
"""Steps of a run; a checkpoint is saved after half of them, and after the last."""
STORE_CALLS = ("set", "get", "wait", "check", "add", "compare_set", "multi_get", "delete_key")
COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast")
COUNTS = ("store calls", "store bytes", "opened", "looked up", "collectives")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["benchmarks.scale", "torch.distributed.fsdp"])


def small_run(directory: Path, source: Path, world: int) -> Run:
    model = Llama3Config(
        vocab_size=320, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=128
    )
    return Run(
        model=model,
        output_dir=directory,
        data=DataConfig(source=str(source)),
        training=TrainingConfig(
            steps=STEPS, sequence_length=32, global_batch_size=world, micro_batch_size=1, device="cpu"
        ),
        optimizer=OptimizerConfig(warmup_steps=1),
        parallel=ParallelConfig(timeout=600),
        validation=ValidationConfig(every=0),
        checkpoint=CheckpointConfig(every=STEPS // 2),
        logging=LoggingConfig(tensorboard=False, sample_tokens=0),
    )


class Meter:
    """Counts of this process by phase of the run: start, step, save, resume."""

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        self.counts: Counter[str] = Counter()
        self.phases: dict[str, list[dict[str, float]]] = {}

    def measured(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that makes the call and adds what it has counted to a phase."""

        def counted(*arguments: Any, **options: Any) -> Any:
            before, begin = self.counts.copy(), time.perf_counter()
            result = call(*arguments, **options)
            found = {count: float(self.counts[count] - before[count]) for count in COUNTS}
            found["seconds"] = time.perf_counter() - begin
            self.phases.setdefault(name, []).append(found)
            return result

        return counted

    def means(self) -> dict[str, dict[str, float]]:
        """Return the mean of each count over the occurrences of each phase."""
        return {
            name: {count: sum(one[count] for one in found) / len(found) for count in found[0]}
            for name, found in self.phases.items()
        }

    def install(self) -> None:
        """Count the calls of this process from now on."""
        for name in STORE_CALLS:
            self.count_calls(dist.Store, name, "store calls")
        for name in COLLECTIVES:
            self.count_calls(dist, name, "collectives")
        self.count_calls(files, "safe_open", "opened")  # opens files outside Python
        os.stat, os.lstat = self.count_paths(os.stat), self.count_paths(os.lstat)
        sys.addaudithook(self.on_event)
        Trainer.launch_step = self.measured("step", Trainer.launch_step)  # type: ignore[method-assign]
        Saver.save = self.measured("save", Saver.save)  # type: ignore[method-assign]

    def count_calls(self, owner: Any, name: str, count: str) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            self.counts[count] += 1
            if owner is dist.Store:
                self.counts["store bytes"] += size_of([*arguments, result])
            return result

        setattr(owner, name, counted)

    def count_paths(self, look_up: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def counted(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
            self.counts["looked up"] += self.is_below(path)
            return look_up(path, *arguments, **options)

        return counted

    def on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Audit hook: count opened files and listed directories."""
        if event in ("open", "os.listdir", "os.scandir"):
            self.counts["opened"] += self.is_below(arguments[0])

    def is_below(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.directory)


def size_of(value: Any) -> int:
    """Bytes of the keys and values of a call of the store."""
    if isinstance(value, str | bytes):
        return len(value)
    return sum(map(size_of, value)) if isinstance(value, list | tuple) else 0


def run_rank(rank: int, world: int, port: int, directory: Path, source: Path, results: Any) -> None:
    """Train, then resume the finished run, and report the counts."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    initialize = dist.init_process_group
    dist.init_process_group = lambda backend, **options: initialize("fake", **options)
    meter = Meter(directory)
    meter.install()
    construct, run = Trainer.__init__, small_run(directory, source, world)
    sockets: list[int] = []
    for phase in ("start", "resume"):

        def opened(*arguments: Any, phase: str = phase, **options: Any) -> None:
            meter.measured(phase, construct)(*arguments, **options)
            sockets.append(count_sockets())

        Trainer.__init__ = opened  # type: ignore[method-assign]
        train(run, Terminal(Console(file=io.StringIO())))
    results.put((rank, {**meter.means(), "sockets": {"sockets": float(sockets[0])}}))


def count_sockets() -> int:
    """Open sockets of this process."""
    targets = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            targets.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sum(target.startswith("socket:") for target in targets)


def measure(world: int, source: Path, output: Path) -> list[dict[str, dict[str, float]]]:
    """Return the counts of each rank of a run of `world` ranks."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=600))
    results: Any = CONTEXT.Queue()
    directory = output / str(world)
    processes = [
        CONTEXT.Process(target=run_rank, args=(rank, world, store.port, directory, source, results), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    by_rank = dict(results.get(timeout=900) for _ in processes)
    for process in processes:
        process.join()
    return [by_rank[rank] for rank in range(world)]


def summarize(ranks: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    """Return the counts of rank 0, the most of any other rank, and the sum of store calls, by name."""
    summary: dict[str, float] = {}
    for phase, counts in ranks[0].items():
        for count in counts:
            others = [rank[phase].get(count, 0.0) for rank in ranks[1:]]
            summary[f"{phase}: {count}, rank 0"] = counts[count]
            summary[f"{phase}: {count}, other ranks"] = max(others)
    return summary


def line(worlds: list[int], values: list[float]) -> str:
    """Return the least-squares line a + b n as text, or the mean if the line changes by less than a tenth of it."""
    mean = float(np.mean(values))
    slope, start = np.polyfit(worlds, values, 1) if len(worlds) > 1 else (0.0, mean)
    if abs(slope) * (max(worlds) - min(worlds)) <= 0.1 * mean:
        return f"{mean:.3g}"
    return f"{start:.3g} + {slope:.3g} n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 16, 32, 64])
    worlds = parser.parse_args().ranks
    os.environ["OMP_NUM_THREADS"] = "1"
    output = Path(tempfile.mkdtemp(prefix="scale-"))
    source = output / "text"
    source.mkdir()
    for number in range(200):
        (source / f"{number}.txt").write_text(" ".join(f"word{number + i}" for i in range(50)))
    columns = []
    for world in worlds:
        begin = time.perf_counter()
        columns.append(summarize(measure(world, source, output)))
        print(f"{world} ranks: {time.perf_counter() - begin:.0f} s", flush=True)
    shutil.rmtree(output)
    print("| | " + " | ".join(map(str, worlds)) + " | line |\n|---" + "|---" * (len(worlds) + 1) + "|")
    rows: list[dict[str, object]] = []
    for name in columns[0]:
        values = [column[name] for column in columns]
        fitted = line(worlds, values)
        print(f"| {name} | " + " | ".join(f"{value:.3g}" for value in values) + f" | {fitted} |")
        rows.append({"name": name, "ranks": worlds, "values": values, "line": fitted})
    save("scale", rows)


if __name__ == "__main__":
    main()
