"""Time and memory of a training step on two context-parallel processes, against one process.

    python -m benchmarks.context_step [--length 16384] [--documents lognormal | one]

    needed keys   context parallelism of `sightline train --parallel.context 2`: it exchanges only the needed keys
    all keys      the same with an all-gather of all keys and values of the row
    one process   one process with two threads; the two processes have one thread each

All use the same rows of random tokens: documents of lognormal length with median 300, or one document that fills the
row. They take turns, step by step: llama3-tiny in float32, with FSDP on the two processes. Memory is that of one
process.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_single_autograd

from benchmarks.timing import lognormal_documents, machine, positions_of, processes_in_turn, save
from sightline.attention.exchange import CompletedExchange
from sightline.batch import IGNORE, Batch
from sightline.config import OptimizerConfig, ParallelConfig, TrainingConfig
from sightline.masks import AttentionMask
from sightline.models import build_skeleton, config_of
from sightline.parallel import plan_context
from sightline.parallel.apply import build_parallel
from sightline.parallel.mesh import Mesh
from sightline.parallel.parallel_model import ParallelModel
from sightline.training.optimizer import build_optimizer
from sightline.training.step import train_step

CPU = torch.device("cpu")
ROWS = 4  # different rows, which the steps use in turn


class AllGatherModel(ParallelModel):
    """Assigns the same tokens to each rank, but all-gathers all keys of a row."""

    def local_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        degree, rank = self.mesh.size("context"), self.mesh.index("context")
        (mask,) = inputs["attention_masks"].values()
        plan = plan_context(mask, degree)
        index = torch.cat([plan.queries(peer) for peer in range(degree)], dim=1).argsort(dim=1)
        self.stages[0].exchanges = AllGatherExchange(index, self.mesh.group("context"))
        local = {"attention": mask.take_queries(plan.queries(rank))}
        return {**super().local_inputs(inputs), "attention_masks": local}


class AllGatherExchange(NamedTuple):
    """Both `Exchanges` and `Exchange`: all-gathers all keys of each row.

    index  int64 [B, S], position of each token of the row in the concatenated tokens of all ranks
    """

    index: Tensor
    group: dist.ProcessGroup

    def bind(self, mask: AttentionMask, device: torch.device) -> tuple[AttentionMask, AllGatherExchange]:
        return mask, self

    def start(self, *tensors: Tensor) -> CompletedExchange:
        rows = torch.cat([t.transpose(1, 2).flatten(2) for t in tensors], dim=-1)  # [B, S / degree, C]
        gathered = all_gather_single_autograd(rows.transpose(0, 1).contiguous(), 0, self.group).transpose(0, 1)
        gathered = gathered.gather(1, self.index[..., None].expand(-1, -1, gathered.shape[2]))
        parts = gathered.split([t.shape[1] * t.shape[3] for t in tensors], dim=-1)
        return CompletedExchange(
            tuple(p.unflatten(-1, (t.shape[1], -1)).transpose(1, 2) for p, t in zip(parts, tensors, strict=True))
        )


def batches(length: int, documents: str) -> list[Batch]:
    """Return ROWS batches of one row each."""
    ids = torch.zeros(ROWS, length, dtype=torch.int32) if documents == "one" else lognormal_documents(length, ROWS)
    tokens = torch.randint(8192, ids.shape, generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = IGNORE
    labels[:, :-1][ids[:, 1:] != ids[:, :-1]] = IGNORE
    batch = Batch(tokens=tokens, labels=labels, document_ids=ids, positions=positions_of(ids))
    return [batch[row : row + 1] for row in range(ROWS)]


def step_of(kind: str, length: int, documents: str, parallel: ParallelConfig) -> Callable[[], float]:
    """Return a function that takes a training step of `sightline train` on this rank of the mesh."""
    options = TrainingConfig(sequence_length=length, global_batch_size=1, micro_batch_size=1, device="cpu")
    torch.manual_seed(0)
    model = build_parallel(config_of("llama3-tiny"), options, Mesh(parallel, CPU))
    if kind == "all keys":
        model = AllGatherModel(model.mesh, model.full_model, model.stages)
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-5))
    rows, steps = batches(length, documents), 0

    def step() -> float:
        nonlocal steps
        steps += 1
        result = train_step(model, optimizer, rows[steps % ROWS], None, micro_batch_size=1, max_grad_norm=1.0)
        return result.loss.item()

    return step


def alone(length: int, documents: str) -> Callable[[], float]:
    torch.set_num_threads(2)
    return step_of("one process", length, documents, ParallelConfig())


def shared(kind: str, length: int, documents: str) -> Callable[[], float]:
    """Return a function that takes a step on two processes: this one, and one that it starts and that follows it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "benchmarks.context_step", "--length", str(length), "--documents", documents]
    other = subprocess.Popen([*command, "--follow", kind, "--port", port], stdin=subprocess.PIPE, text=True)
    step = join_processes(0, port, kind, length, documents)

    def both() -> float:
        print("step", file=other.stdin, flush=True)
        return step()

    return both


def follow(port: str, kind: str, length: int, documents: str) -> None:
    """Take a step for each line of stdin, as the second process; end when the first process closes the pipe."""
    step = join_processes(1, port, kind, length, documents)
    for _ in sys.stdin:
        step()


def join_processes(rank: int, port: str, kind: str, length: int, documents: str) -> Callable[[], float]:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo")
    return step_of(kind, length, documents, ParallelConfig(context=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--documents", choices=["lognormal", "one"], default="lognormal")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--follow", help=argparse.SUPPRESS)
    parser.add_argument("--port", help=argparse.SUPPRESS)
    options = parser.parse_args()
    arguments = (options.length, options.documents)
    if options.follow:
        return follow(options.port, options.follow, *arguments)
    measured = processes_in_turn(
        {
            "needed keys": (shared, ("needed keys", *arguments)),
            "all keys": (shared, ("all keys", *arguments)),
            "one process": (alone, arguments),
        },
        options.rounds,
    )
    table = Table(title=f"S = {options.length}, {options.documents} documents, {machine()}")
    for name in ("contestant", "tokens/s", "peak MiB", "needed keys is faster by"):
        table.add_column(name, justify="left" if name == "contestant" else "right")
    needed_seconds = measured["needed keys"][0]
    results: list[dict[str, object]] = []
    for name, (seconds, peak) in measured.items():
        speed = options.length / seconds
        table.add_row(name, f"{speed:.0f}", f"{peak:.0f}", f"{seconds / needed_seconds:.2f}x")
        results.append({"length": options.length, "contestant": name, "tokens_per_second": speed, "peak_mib": peak})
    Console().print(table)
    Console().print(f"needed: {share_of_keys(*arguments):.1%} of all keys")
    save(f"context-step-{options.documents}", results)


def share_of_keys(length: int, documents: str) -> float:
    """Keys that two processes exchange, as a share of an all-gather."""
    model = build_skeleton("llama3-tiny")
    plans = [plan_context(model.get_attention_masks(batch), 2) for batch in batches(length, documents)]
    return sum(int(plan.received_keys().sum()) for plan in plans) / (len(plans) * length)


if __name__ == "__main__":
    main()
