"""Time of attention, forward + backward, against SDPA with a dense mask and against the limit of the machine.

    python -m benchmarks.attention [--lengths 2048 4096 8192 32768] [--heads 8] [--head-dim 64] [--threads 1]

The limit is the time of 14 x heads x head dim x visible pairs FLOPs (4 forward, 10 backward with its recomputation, as
FlashAttention counts) at the matrix-product rate of this machine, which is timed in turn in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.timing import (
    GEMM_FLOPS,
    even_documents,
    gemm,
    in_turn,
    lognormal_documents,
    machine,
    positions_of,
    save,
)
from sightline.attention import attend, lower
from sightline.masks import AttentionMask, causal, chunked, document, prefix_lm, shared_prefix, sliding_window

MAX_DENSE_LENGTH = 8192  # kernels that compute every pair take minutes for longer rows


def masks(length: int) -> dict[str, AttentionMask]:
    """Masks of the table by name, each for one row of `length` tokens."""
    ids = lognormal_documents(length)
    long_ids = even_documents(length, 3)
    positions = positions_of(ids)
    order = causal(1, length)
    packed = order & document(ids)
    rollouts = even_documents(length, 9 * max(1, length // 8192))
    prompts = rollouts - rollouts % 9  # one prompt, eight responses
    return {
        "documents, lognormal": packed,
        "documents, 3 long": order & document(long_ids),
        "window 256, lognormal": sliding_window(1, length, 256) & document(ids),
        "window 256, 3 long": sliding_window(1, length, 256) & document(long_ids),
        "chunk 512, lognormal": chunked(positions, 512) & packed,
        "prefix-LM 100, lognormal": (prefix_lm(positions, torch.full_like(positions, 100)) | order) & document(ids),
        "shared prefix, 8 responses": shared_prefix(rollouts, prompts) & order,
    }


def step(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, run: Callable[..., Tensor]) -> Callable[[], None]:
    """Return a function that runs forward and backward of `run(q, k, v)`."""

    def forward_backward() -> None:
        for x in (q, k, v):
            x.grad = None
        run(q, k, v).backward(grad)

    return forward_backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 32768])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=None, help="default: the same number as --heads")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="only masks whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    heads, head_dim = options.heads, options.head_dim
    kv_heads = options.kv_heads or heads
    rows: list[dict[str, object]] = []
    table = Table(title=f"attention, forward + backward, float32, H={heads} G={kv_heads} D={head_dim}, {machine()}")
    for name in ("S", "mask", "ms", "x dense", "x causal row", "% of limit"):
        table.add_column(name, justify="left" if name == "mask" else "right")
    for length in options.lengths:
        q = torch.randn(1, length, heads, head_dim).transpose(1, 2).requires_grad_()
        k, v = (torch.randn(1, length, kv_heads, head_dim).transpose(1, 2).requires_grad_() for _ in range(2))
        grad = torch.randn(1, length, heads, head_dim).transpose(1, 2)
        contestants: dict[str, Callable[[], object]] = {"gemm": gemm()}
        chosen = {name: mask for name, mask in masks(length).items() if options.only in name}
        for name, mask in chosen.items():
            lowered = lower(mask, device="cpu", dtype=torch.float32, training=True)
            contestants[name] = step(q, k, v, grad, lambda q, k, v, lowered=lowered: attend(q, k, v, lowered))
        if length <= MAX_DENSE_LENGTH:
            # The time of a dense mask does not depend on its values: measure one of them for all.
            dense = next(iter(chosen.values())).to_dense().unsqueeze(1)
            gqa = {"enable_gqa": kv_heads != heads}
            for name, sdpa_options in (
                ("dense", {"attn_mask": dense, **gqa}),
                ("causal row", {"is_causal": True, **gqa}),
            ):
                contestants[name] = step(
                    q, k, v, grad,
                    lambda q, k, v, o=sdpa_options: F.scaled_dot_product_attention(q, k, v, **o),
                )  # fmt: skip
        seconds = in_turn(contestants, options.rounds)
        for name, mask in chosen.items():
            limit = 14 * heads * head_dim * int(mask.visible_pairs().sum()) / (GEMM_FLOPS / seconds["gemm"])
            times = {
                f"times_{other}": seconds[other] / seconds[name]
                for other in ("dense", "causal row")
                if other in seconds
            }
            share = limit / seconds[name]
            rows.append({"length": length, "mask": name, "ms": 1e3 * seconds[name], "share_of_limit": share, **times})
            shown = (f"{times[f'times_{other}']:.1f}" if times else "-" for other in ("dense", "causal row"))
            table.add_row(str(length), name, f"{1e3 * seconds[name]:.0f}", *shown, f"{100 * share:.0f}")
        table.add_section()
    Console().print(table)
    save(f"attention-h{heads}-g{kv_heads}-d{head_dim}-{options.threads}t", rows)


if __name__ == "__main__":
    main()
