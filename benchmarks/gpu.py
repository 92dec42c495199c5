"""Time of attention on a GPU: flex with Sightline's mask_mod against the usual closures, varlen and dense SDPA.

    python -m benchmarks.gpu             on CUDA: measure
    python -m benchmarks.gpu --dry-run   on a CPU: run every part once at a small size, to test the script

1. mask work (rules, block mask) against the attention of one layer, S = 8k .. 128k
2. flex forward + backward, with our mask_mod and with the usual closures for the same mask
3. attention of a 125M model (12 heads of 64) with 8 documents per row: flex and varlen against dense SDPA
4. bfloat16 error of every backend against a float32 reference
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.timing import even_documents, in_turn, lognormal_documents, machine, save
from sightline.attention import attend, lower
from sightline.masks import causal, document, sliding_window


def closures(ids: Tensor, window: int | None) -> Callable[..., Tensor]:
    """The usual document mask_mod: a closure over document ids, with or without a window."""

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        visible = (ids[b, q_idx] == ids[b, kv_idx]) & (q_idx >= kv_idx)
        return visible if window is None else visible & (q_idx - kv_idx < window)

    return mask_mod


class Bench:
    """Sizes, device and helpers of all parts of the benchmark."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.heads, self.head_dim = (2, 16) if dry else (12, 64)
        self.rounds = 1 if dry else 20
        self.rows: list[dict[str, object]] = []
        # On a CPU flex has no backward and varlen does not exist: the dry run leaves them out.
        self.training = not dry
        self.backends = ["flex", "sdpa"] if dry else ["flex", "varlen", "sdpa"]
        self.compiled = torch.compile(flex_attention, dynamic=False)

    def qkv(self, rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        shape = (rows, length, self.heads, self.head_dim)
        q, k, v = (
            torch.randn(shape, device=self.device, dtype=self.dtype).transpose(1, 2).requires_grad_(self.training)
            for _ in range(3)
        )
        return q, k, v

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, run: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Callable[[], None]:
        """Return a function that runs the forward, and the backward if `training`."""

        def once() -> None:
            out = run(q, k, v)
            if self.training:
                torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

        return once

    def record(self, part: str, **facts: object) -> None:
        self.rows.append({"part": part, **facts})
        Console().print(part, {key: round(v, 4) if isinstance(v, float) else v for key, v in facts.items()})

    def mask_work(self) -> None:
        for length in (512,) if self.dry else (8192, 16384, 32768, 65536, 131072):
            ids = lognormal_documents(length).to(self.device)
            q, k, v = self.qkv(1, length)
            mask = causal(1, length, device=self.device) & document(ids)
            lowered = lower(mask, backend="flex", device=self.device, dtype=self.dtype, training=self.training)
            seconds = in_turn(
                {
                    "rules": lambda n=length, ids=ids: causal(1, n, device=self.device) & document(ids),
                    "block mask": lambda mask=mask: mask.to_block_mask(compute_q_blocks=self.training),
                    "attention": self.step(q, k, v, lambda q, k, v, lowered=lowered: attend(q, k, v, lowered)),
                },
                self.rounds,
            )
            work = seconds["rules"] + seconds["block mask"]
            self.record("mask work", length=length, ms=1e3 * work, share_of_attention=work / seconds["attention"])

    def against_closures(self) -> None:
        for length in (512,) if self.dry else (8192, 32768):
            ids = lognormal_documents(length).to(self.device)
            q, k, v = self.qkv(1, length)
            for window in (None, 256):
                rule = causal(1, length, device=self.device) if window is None else (
                    sliding_window(1, length, window, device=self.device)
                )  # fmt: skip
                block_masks = {
                    "ours": (rule & document(ids)).to_block_mask(compute_q_blocks=self.training),
                    "closures": create_block_mask(closures(ids, window), 1, None, length, length, device=self.device),
                }
                seconds = in_turn(
                    {
                        name: self.step(q, k, v, lambda q, k, v, mask=mask: self.compiled(q, k, v, block_mask=mask))
                        for name, mask in block_masks.items()
                    },
                    self.rounds,
                )
                ratio = seconds["closures"] / seconds["ours"]
                self.record("flex", length=length, window=window, ms=1e3 * seconds["ours"], closures_times=ratio)

    def eight_documents(self) -> None:
        for length in (64, 256) if self.dry else (512, 1024, 2048, 4096, 8192):
            rows = 1 if self.dry else max(1, 16384 // length)
            ids = even_documents(length, 8).expand(rows, -1).to(self.device)
            mask = causal(rows, length, device=self.device) & document(ids)
            dense = mask.to_dense().unsqueeze(1)
            q, k, v = self.qkv(rows, length)
            contestants = {
                "dense": self.step(
                    q, k, v, lambda q, k, v, dense=dense: F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
                )
            }
            for backend in self.backends:
                lowered = lower(mask, backend=backend, device=self.device, dtype=self.dtype, training=self.training)
                contestants[backend] = self.step(q, k, v, lambda q, k, v, lowered=lowered: attend(q, k, v, lowered))
            seconds = in_turn(contestants, self.rounds)
            times = {f"{name}_times_dense": seconds["dense"] / seconds[name] for name in self.backends}
            self.record("8 documents per row", length=length, rows=rows, dense_ms=1e3 * seconds["dense"], **times)

    def errors(self) -> None:
        length = 256 if self.dry else 4096
        ids = lognormal_documents(length).to(self.device)
        mask = causal(1, length, device=self.device) & document(ids)
        q, k, v = self.qkv(1, length)
        expected = attend(*(x.detach().float() for x in (q, k, v)), mask, backend="reference")
        for backend in self.backends:
            out = attend(q, k, v, mask, backend=backend)
            self.record("error", backend=backend, relative=float((out.float() - expected).norm() / expected.norm()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("found no CUDA device; run on a machine with one, or use --dry-run")
    bench = Bench(options.dry_run)
    Console().print(machine())
    for part in (bench.mask_work, bench.against_closures, bench.eight_documents, bench.errors):
        part()
    if not bench.dry:
        save("gpu", bench.rows)


if __name__ == "__main__":
    main()
