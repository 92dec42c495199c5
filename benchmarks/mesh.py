"""Overhead of the distributed code on one process, and memory per rank under FSDP.

    python -m benchmarks.mesh                                   time of a step on one process, with and without the code
    torchrun --nproc-per-node 4 -m benchmarks.mesh              memory of llama3-tiny on each of 4 ranks

Without the distributed code a step is plain PyTorch: forward and backward of each micro-batch, clip_grad_norm_, the
optimizer. Each contestant runs in a separate process, and they take turns, step by step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.timing import machine, processes_in_turn, save
from benchmarks.training_step import cycle, rows_of
from sightline.config import OptimizerConfig, ParallelConfig, TrainingConfig
from sightline.models import build_model, config_of
from sightline.parallel.apply import build_parallel
from sightline.parallel.launch import distributed_session
from sightline.parallel.mesh import Mesh
from sightline.parallel.parallel_model import ParallelModel, single_process_model
from sightline.training.optimizer import build_optimizer
from sightline.training.step import prepare_batch, train_step

CPU = torch.device("cpu")


def distributed_step(length: int, threads: int) -> Callable[[], float]:
    """Return a function that takes a step of `sightline train` on one process."""
    torch.set_num_threads(threads)
    tokenizer, rows = rows_of(length)
    model = build_model("llama3-tiny")
    alone, optimizer, following = single_process_model(model), build_optimizer(model, OptimizerConfig()), cycle(rows)
    return lambda: train_step(
        alone, optimizer, following(), tokenizer, micro_batch_size=1, max_grad_norm=1.0
    ).loss.item()


def plain_step(length: int, threads: int) -> Callable[[], float]:
    """Return a function that takes the same step in plain PyTorch."""
    torch.set_num_threads(threads)
    tokenizer, rows = rows_of(length)
    model = build_model("llama3-tiny")
    optimizer, following = build_optimizer(model, OptimizerConfig()), cycle(rows)

    def step() -> float:
        batch = following()
        optimizer.zero_grad(set_to_none=True)
        loss = model(**prepare_batch(model, batch, tokenizer, CPU)) / batch.valid_tokens()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def measure_overhead(arguments: argparse.Namespace) -> None:
    options = (arguments.length, arguments.threads)
    makers = {"distributed code": (distributed_step, options), "plain PyTorch": (plain_step, options)}
    seconds = {name: took for name, (took, _) in processes_in_turn(makers, arguments.rounds).items()}
    ratio = seconds["distributed code"] / seconds["plain PyTorch"]
    for name, took in seconds.items():
        print(f"{name:<18} {took * 1e3:8.1f} ms per step")
    print(f"overhead of the distributed code: {ratio - 1:+.2%} ({machine()})")
    save("mesh_overhead", [{"length": arguments.length, "rounds": arguments.rounds, **seconds, "ratio": ratio}])


def local_bytes(model: ParallelModel) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state on this rank after a step."""
    optimizer = build_optimizer(model, OptimizerConfig())
    local = {"weights": 0, "gradients": 0, "optimizer state": 0}
    for _, parameter in model.named_parameters():
        parameter.grad = torch.zeros_like(parameter)
        state = [value for value in optimizer.state[parameter].values()]
        for kind, tensors in (("weights", [parameter]), ("gradients", [parameter.grad]), ("optimizer state", state)):
            local[kind] += sum(t.to_local().nbytes if hasattr(t, "to_local") else t.nbytes for t in tensors)
    return local


def measure_memory(model: str) -> None:
    with distributed_session(ParallelConfig(), CPU) as device:
        mesh = Mesh(ParallelConfig(), device)
        local = sum(local_bytes(build_parallel(config_of(model), TrainingConfig(device="cpu"), mesh)).values())
        most = torch.tensor(local)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        alone = sum(local_bytes(single_process_model(build_model(model))).values())
        if mesh.rank == 0:
            print(f"{model}: {alone / 2**20:.1f} MiB of weights, gradients and optimizer state on one process")
            print(f"shard {mesh.size('shard')}: at most {int(most) / 2**20:.1f} MiB per rank, {int(most) / alone:.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--model", default="llama3-tiny")
    arguments = parser.parse_args()
    if torch.distributed.is_torchelastic_launched():
        measure_memory(arguments.model)
    else:
        measure_overhead(arguments)


if __name__ == "__main__":
    main()
