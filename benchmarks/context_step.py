"""A whole training step on rows that two processes share, against one process that has the rows to itself.

    python -m benchmarks.context_step [--length 16384] [--documents lognormal | one]

    needed keys   context parallelism as `sightline train --parallel.context 2` has it: the keys that are needed travel
    all keys      the same, but all keys and values of the row travel to both processes, by an all-gather
    one process   with two threads, where the processes have one each

All take the same rows of random tokens: documents of lognormal length with a median of 300, or one that fills the row.
They take their steps in turn, llama3-tiny in float32 with FSDP over the two processes; the memory is that of one.
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
ROWS = 4  # different ones, which the steps take in turn


class SendsAll(ParallelModel):
    """Shares the rows in the same order, but not the keys: all of the row travel to every process."""

    def local_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        degree, rank = self.mesh.size("context"), self.mesh.index("context")
        (mask,) = inputs["attention_masks"].values()
        plan = plan_context(mask, degree)
        place = torch.cat([plan.queries(peer) for peer in range(degree)], dim=1).argsort(dim=1)
        self.stages[0].exchanges = AllKeys(place, self.mesh.group("context"))
        cut = {"attention": mask.take_queries(plan.queries(rank))}
        return {**super().local_inputs(inputs), "attention_masks": cut}


class AllKeys(NamedTuple):
    """The exchanges of a batch, and the one exchange they make: it brings all keys of each row, by an all-gather.

    place  int64 [B, S], where each token of the row is when the tokens of all processes lie end to end
    """

    place: Tensor
    group: dist.ProcessGroup

    def bind(self, mask: AttentionMask, device: torch.device) -> tuple[AttentionMask, AllKeys]:
        return mask, self

    def start(self, *tensors: Tensor) -> CompletedExchange:
        rows = torch.cat([t.transpose(1, 2).flatten(2) for t in tensors], dim=-1)  # [B, S / degree, C]
        came = all_gather_single_autograd(rows.transpose(0, 1).contiguous(), 0, self.group).transpose(0, 1)
        came = came.gather(1, self.place[..., None].expand(-1, -1, came.shape[2]))
        parts = came.split([t.shape[1] * t.shape[3] for t in tensors], dim=-1)
        return CompletedExchange(
            tuple(p.unflatten(-1, (t.shape[1], -1)).transpose(1, 2) for p, t in zip(parts, tensors, strict=True))
        )


def batches(length: int, documents: str) -> list[Batch]:
    """Batches of one row each."""
    ids = torch.zeros(ROWS, length, dtype=torch.int32) if documents == "one" else lognormal_documents(length, ROWS)
    tokens = torch.randint(8192, ids.shape, generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, dims=1)
    labels[:, -1] = IGNORE
    labels[:, :-1][ids[:, 1:] != ids[:, :-1]] = IGNORE
    whole = Batch(tokens=tokens, labels=labels, document_ids=ids, positions=positions_of(ids))
    return [whole[row : row + 1] for row in range(ROWS)]


def step_of(kind: str, length: int, documents: str, parallel: ParallelConfig) -> Callable[[], float]:
    """A step as `sightline train` takes it, on this process's part of the mesh."""
    options = TrainingConfig(sequence_length=length, global_batch_size=1, micro_batch_size=1, device="cpu")
    torch.manual_seed(0)
    model = build_parallel(config_of("llama3-tiny"), options, Mesh(parallel, CPU))
    if kind == "all keys":
        model = SendsAll(model.mesh, model.full_model, model.stages)
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-5))
    rows, taken = batches(length, documents), 0

    def step() -> float:
        nonlocal taken
        taken += 1
        result = train_step(model, optimizer, rows[taken % ROWS], None, micro_batch_size=1, max_grad_norm=1.0)
        return result.loss.item()

    return step


def alone(length: int, documents: str) -> Callable[[], float]:
    torch.set_num_threads(2)
    return step_of("one process", length, documents, ParallelConfig())


def shared(kind: str, length: int, documents: str) -> Callable[[], float]:
    """A step of two processes, of which this starts the other: it takes as many as are asked of this one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "benchmarks.context_step", "--length", str(length), "--documents", documents]
    other = subprocess.Popen([*command, "--follow", kind, "--port", port], stdin=subprocess.PIPE, text=True)
    step = join(0, port, kind, length, documents)

    def both() -> float:
        print("step", file=other.stdin, flush=True)
        return step()

    return both


def follow(port: str, kind: str, length: int, documents: str) -> None:
    """The other process takes a step for each line; it ends when the first process does, which closes the pipe."""
    step = join(1, port, kind, length, documents)
    for _ in sys.stdin:
        step()


def join(rank: int, port: str, kind: str, length: int, documents: str) -> Callable[[], float]:
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
    given = (options.length, options.documents)
    if options.follow:
        return follow(options.port, options.follow, *given)
    measured = processes_in_turn(
        {
            "needed keys": (shared, ("needed keys", *given)),
            "all keys": (shared, ("all keys", *given)),
            "one process": (alone, given),
        },
        options.rounds,
    )
    table = Table(title=f"S = {options.length}, {options.documents} documents, {machine()}")
    for name in ("contestant", "tokens/s", "peak MiB", "needed keys is faster by"):
        table.add_column(name, justify="left" if name == "contestant" else "right")
    own = measured["needed keys"][0]
    results: list[dict[str, object]] = []
    for name, (seconds, peak) in measured.items():
        speed = options.length / seconds
        table.add_row(name, f"{speed:.0f}", f"{peak:.0f}", f"{seconds / own:.2f}x")
        results.append({"length": options.length, "contestant": name, "tokens_per_second": speed, "peak_mib": peak})
    Console().print(table)
    Console().print(f"of all keys {share_of_keys(*given):.1%} are needed")
    save(f"context-step-{options.documents}", results)


def share_of_keys(length: int, documents: str) -> float:
    """Keys that travel, as a share of those that an all-gather between two processes sends."""
    model = build_skeleton("llama3-tiny")
    plans = [plan_context(model.get_attention_masks(batch), 2) for batch in batches(length, documents)]
    return sum(int(plan.received_keys().sum()) for plan in plans) / (len(plans) * length)


if __name__ == "__main__":
    main()
