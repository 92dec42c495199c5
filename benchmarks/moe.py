"""A layer of experts against one feed-forward layer of the same active parameters, forward and backward.

    python -m benchmarks.moe [--tokens 2048] [--threads 2]

Each token meets the same matrices in number and size: K experts of F inner channels and the router, or one SwiGLU of
K * F. The experts' weights are E / K times as many, of which all are read and all have a gradient. `of it grouped`
are the matrix products alone, with tokens that are permute evenly and lie sorted already: what routing adds is the rest.
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
    # name: width, experts, experts a token, inner width
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

    table = Table("layer", "dense ms", "experts ms", "ratio", "of it grouped", title=f"{options.tokens} tokens")
    rows: list[dict[str, object]] = []
    for name, (width, experts, top_k, ffn) in CASES.items():
        times = in_turn(contestants(options.tokens, width, experts, top_k, ffn), options.rounds)
        dense, sparse, grouped = (times[part] for part in ("dense", "experts", "grouped"))
        cells = (f"{dense * 1e3:.1f}", f"{sparse * 1e3:.1f}", f"{sparse / dense:.2f}", f"{grouped / dense:.2f}")
        table.add_row(f"{name}: {top_k} of {experts}, width {width}, inner {ffn}", *cells)
        rows.append({"layer": name, "tokens": options.tokens, **times})
    console = Console(width=120)
    console.print(machine())
    console.print(table)
    save(f"moe-{options.threads}t", rows)


def contestants(tokens: int, width: int, experts: int, top_k: int, ffn: int) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    x = torch.randn(1, tokens, width, requires_grad=True)
    dense = SwiGLU(width, top_k * ffn)
    moe = MoE(Router(width, experts, top_k, renormalize=True), Experts(experts, width, ffn))
    for layer in (dense, moe):
        layer.init_weights(width**-0.5, width**-0.5)
    rows = torch.randn(tokens * top_k, width, requires_grad=True)
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
