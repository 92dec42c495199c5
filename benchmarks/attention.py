"""Attention alone, forward + backward, against SDPA with a dense mask and against the limit of the machine.

    python -m benchmarks.attention [--lengths 2048 4096 8192 32768] [--heads 8] [--head-size 64] [--threads 1]

The limit is the attended pairs at this machine's own matrix-product rate, timed in turn in the same run:
14 x heads x head size x visible pairs FLOPs (4 forward, 10 backward with its recomputation, as FlashAttention counts).
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

PLAIN_UP_TO = 8192  # what looks at every pair takes minutes further on


def masks(length: int) -> dict[str, AttentionMask]:
    """The masks of the table, each over one row of `length` tokens."""
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
    def forward_backward() -> None:
        for x in (q, k, v):
            x.grad = None
        run(q, k, v).backward(grad)

    return forward_backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 32768])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=None, help="default: as many as --heads")
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="only masks whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    heads, size = options.heads, options.head_size
    kv_heads = options.kv_heads or heads
    rows: list[dict[str, object]] = []
    table = Table(title=f"attention, forward + backward, float32, H={heads} G={kv_heads} D={size}, {machine()}")
    for name in ("S", "mask", "ms", "x dense", "x causal row", "% of limit"):
        table.add_column(name, justify="left" if name == "mask" else "right")
    for length in options.lengths:
        q = torch.randn(1, length, heads, size).transpose(1, 2).requires_grad_()
        k, v = (torch.randn(1, length, kv_heads, size).transpose(1, 2).requires_grad_() for _ in range(2))
        grad = torch.randn(1, length, heads, size).transpose(1, 2)
        contestants: dict[str, Callable[[], object]] = {"gemm": gemm()}
        chosen = {name: mask for name, mask in masks(length).items() if options.only in name}
        for name, mask in chosen.items():
            lowered = lower(mask, device="cpu", dtype=torch.float32, training=True)
            contestants[name] = step(q, k, v, grad, lambda q, k, v, form=lowered: attend(q, k, v, form))
        if length <= PLAIN_UP_TO:
            # What is dense costs the same whatever it shows, so one dense mask stands for all.
            dense = next(iter(chosen.values())).to_dense().unsqueeze(1)
            gqa = {"enable_gqa": kv_heads != heads}
            for name, options_of_sdpa in (
                ("dense", {"attn_mask": dense, **gqa}),
                ("causal row", {"is_causal": True, **gqa}),
            ):
                contestants[name] = step(
                    q, k, v, grad,
                    lambda q, k, v, o=options_of_sdpa: F.scaled_dot_product_attention(q, k, v, **o),
                )  # fmt: skip
        seconds = in_turn(contestants, options.rounds)
        for name, mask in chosen.items():
            limit = 14 * heads * size * int(mask.visible_pairs().sum()) / (GEMM_FLOPS / seconds["gemm"])
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
    save(f"attention-h{heads}-g{kv_heads}-d{size}-{options.threads}t", rows)


if __name__ == "__main__":
    main()
