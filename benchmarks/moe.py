"""Time of an MoE layer against a dense MLP with the same number of active parameters, forward and backward.

    python -m benchmarks.moe [--tokens 2048] [--threads 2]

Each token is multiplied by the same number of weights: K experts of intermediate size F and the router, or one SwiGLU
of intermediate size K * F. The MoE layer has E / K times as many weights; all are read and have a gradient. `grouped`
is the time of the grouped matrix products alone, on evenly distributed tokens that are already sorted by expert, as a
share of the dense MLP; routing is the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.timing import in_turn, machine, save
from sightline.layers import Experts, MoE, Router, SwiGLU

CASES = {
    # name: hidden size, experts, experts per token, intermediate size
    "deepseek_v3-tiny": (256, 16, 4, 128),
    "gpt_oss-tiny": (256, 8, 2, 344),
    "wide": (1024, 16, 4, 512),
    "many": (512, 64, 8, 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    table = Table("layer", "dense ms", "experts ms", "ratio", "grouped", title=f"{options.tokens} tokens")
    rows: list[dict[str, object]] = []
    for name, (hidden_size, experts, top_k, intermediate_size) in CASES.items():
        times = in_turn(contestants(options.tokens, hidden_size, experts, top_k, intermediate_size), options.rounds)
        dense, sparse, grouped = (times[part] for part in ("dense", "experts", "grouped"))
        cells = (f"{dense * 1e3:.1f}", f"{sparse * 1e3:.1f}", f"{sparse / dense:.2f}", f"{grouped / dense:.2f}")
        table.add_row(f"{name}: {top_k} of {experts}, hidden {hidden_size}, intermediate {intermediate_size}", *cells)
        rows.append({"layer": name, "tokens": options.tokens, **times})
    console = Console(width=120)
    console.print(machine())
    console.print(table)
    save(f"moe-{options.threads}t", rows)


def contestants(
    tokens: int, hidden_size: int, experts: int, top_k: int, intermediate_size: int
) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    x = torch.randn(1, tokens, hidden_size, requires_grad=True)
    dense = SwiGLU(hidden_size, top_k * intermediate_size)
    moe = MoE(Router(hidden_size, experts, top_k, renormalize=True), Experts(experts, hidden_size, intermediate_size))
    for layer in (dense, moe):
        layer.init_weights(hidden_size**-0.5, hidden_size**-0.5)
    rows = torch.randn(tokens * top_k, hidden_size, requires_grad=True)
    counts = torch.full((experts,), tokens * top_k // experts)
    return {
        "dense": lambda: forward_and_backward(dense, x),
        "experts": lambda: forward_and_backward(moe, x),
        "grouped": lambda: forward_and_backward(moe.experts, rows, counts),
    }


def forward_and_backward(layer: nn.Module, *inputs: Tensor) -> None:
    for tensor in (*inputs, *layer.parameters()):
        tensor.grad = None
    out = layer(*inputs)
    out.backward(torch.ones_like(out))


if __name__ == "__main__":
    main()
