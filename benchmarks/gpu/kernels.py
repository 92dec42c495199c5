"""Attention of one layer, forward + backward: every backend that supports the mask, dense masks and usual closures."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.attention import masks
from benchmarks.gpu.bench import Bench, describe
from benchmarks.timing import lognormal_documents
from sightline.attention import attend, lower
from sightline.masks import AttentionMask
from sightline.training.flops import find_peak

BACKENDS = ("flex", "varlen", "sdpa")
MASKS = (
    "documents, lognormal",
    "documents, 3 long",
    "window 512",
    "chunk 512, lognormal",
    "prefix-LM 100, lognormal",
    "shared prefix, 8 responses",
)
CLOSURES = {"documents, lognormal": None, "window 256, lognormal": 256}
"""Masks that are also timed with the usual `mask_mod`, and their windows."""
MAX_DENSE_LENGTH = 8192
MAX_GRAPHS = 64  # flex compiles a kernel for each length and number of intervals; by default torch allows eight


def short(bench: Bench) -> None:
    """Lengths at which kernels that compute every pair can be compared."""
    lengths = (256,) if bench.smoke else (2048, 8192)
    layer = Layer(bench)
    layer.errors(lengths[0])
    for length in lengths:
        layer.measure(length)
    layer.closures(lengths[-1])


def long(bench: Bench) -> None:
    """Lengths at which dense masks do not fit."""
    layer = Layer(bench)
    for length in (512,) if bench.smoke else (32768, 131072):
        layer.measure(length)


def document_closure(ids: Tensor, window: int | None) -> Callable[..., Tensor]:
    """The usual document mask_mod: a closure over document ids [B, S], with or without a window."""

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        visible = (ids[b, q_idx] == ids[b, kv_idx]) & (q_idx >= kv_idx)
        return visible if window is None else visible & (q_idx - kv_idx < window)

    return mask_mod


class Layer:
    """Attention of the shape of an 8B model: 32 heads of 128 channels, 8 key/value heads."""

    def __init__(self, bench: Bench) -> None:
        torch._dynamo.config.recompile_limit = MAX_GRAPHS
        self.bench = bench
        self.heads, self.kv_heads, self.head_dim = (4, 2, 16) if bench.smoke else (32, 8, 128)
        self.training = not bench.smoke  # FlexAttention has no backward on a CPU
        # The FLOPs of one channel, head and pair, as FlashAttention counts them: 4 forward, 10 backward.
        self.flops = (14 if self.training else 4) * self.heads * self.head_dim
        self.peak = find_peak(bench.device, "float32" if bench.smoke else "bfloat16").flops
        self.compiled = torch.compile(flex_attention, dynamic=False)

    def qkv(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            torch.randn(1, length, heads, self.head_dim, device=self.bench.device, dtype=self.bench.dtype)
            .transpose(1, 2)
            .requires_grad_(self.training)
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        return q, k, v

    def step(self, inputs: tuple[Tensor, ...], run: Callable[..., Tensor]) -> Callable[[], None]:
        """Return a function that runs the forward, and the backward if `training`."""
        grad = torch.ones_like(inputs[0])

        def once() -> None:
            out = run(*inputs)
            if self.training:
                torch.autograd.grad(out, inputs, grad)

        return once

    def backends(
        self, mask: AttentionMask, inputs: tuple[Tensor, ...], names: tuple[str, ...]
    ) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
        """Return a contestant for each backend that supports the mask, and the reasons of the others."""
        contestants: dict[str, Callable[[], object]] = {}
        reasons = {}
        for name in names:
            try:
                lowered = lower(
                    mask, backend=name, device=self.bench.device, dtype=self.bench.dtype, training=self.training,
                    head_dim=self.head_dim,
                )  # fmt: skip
            except Exception as error:
                reasons[name] = "not supported" if isinstance(error, ValueError) else describe(error)
                continue
            contestants[name] = self.step(inputs, lambda q, k, v, lowered=lowered: attend(q, k, v, lowered))
        return contestants, reasons

    def measure(self, length: int) -> None:
        """Record the time of each mask, and the rate of its visible pairs as a share of the card's peak."""
        bench = self.bench
        inputs = self.qkv(length)
        chosen = masks(length)
        names = MASKS[::5] if bench.smoke else MASKS  # compilation takes ten seconds a kernel on a CPU
        backends = BACKENDS if length <= MAX_DENSE_LENGTH else BACKENDS[:-1]
        for name in names:
            facts = {"table": "Time of a layer", "S": length, "mask": name}
            if not bench.has_time(8, **facts):
                return
            with bench.attempt(**facts):
                mask = chosen[name]
                contestants, errors = self.backends(mask, inputs, backends)
                if length <= MAX_DENSE_LENGTH:
                    contestants["dense mask"] = self.step(inputs, self.dense(mask))
                if name == names[0]:  # it takes more than a second for 128k, whatever the mask
                    contestants["full causal row"] = self.step(inputs, self.causal)
                errors |= bench.warm_up(contestants)
                times = bench.in_turn(contestants, kernels_only=True)
                work = self.flops * int(mask.visible_pairs().sum())
                results: dict[str, object] = {"pairs": f"{mask.visible_pairs().sum() / (length**2 / 2):.1%} of causal"}
                for contestant in (*backends, "dense mask", "full causal row"):
                    if contestant in times:
                        results[f"{contestant}, ms"] = times[contestant]
                        if contestant in ("flex", "varlen"):
                            results[f"{contestant}, of peak"] = f"{work / (times[contestant] / 1e3 * self.peak):.1%}"
                    elif contestant in errors:
                        results[f"{contestant}, ms"] = errors[contestant]
                bench.record(**facts, **results)

    def causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """SDPA over the full row: the fastest kernel for one document, where every document leaks into the next."""
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def dense(self, mask: AttentionMask) -> Callable[..., Tensor]:
        """SDPA with a dense mask, with repeated keys and values: kernels that take a mask do not group queries."""
        visible = mask.to(self.bench.device).to_dense().unsqueeze(1)
        groups = self.heads // self.kv_heads

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=visible)

        return run

    def closures(self, length: int) -> None:
        """Record flex with our `mask_mod` against flex with the usual closure for the same mask."""
        bench = self.bench
        inputs = self.qkv(length)
        ids = lognormal_documents(length).to(bench.device)
        for name, window in list(CLOSURES.items())[: 1 if bench.smoke else None]:
            facts: dict[str, object] = {
                "table": "FlexAttention with our mask_mod and with a closure over document ids",
                "S": length,
                "mask": name,
            }
            if not bench.has_time(15, **facts):
                return
            with bench.attempt(**facts):
                contestants, _ = self.backends(masks(length)[name], inputs, ("flex",))
                closure = document_closure(ids, window)
                block_mask = create_block_mask(closure, 1, None, length, length, device=bench.device)
                contestants["closure"] = self.step(
                    inputs,
                    lambda q, k, v, block_mask=block_mask: self.compiled(q, k, v, block_mask=block_mask,
                                                                         enable_gqa=True),
                )  # fmt: skip
                errors = bench.warm_up(contestants)
                results: dict[str, object] = {**errors, **bench.in_turn(contestants, kernels_only=True)}
                bench.record(**facts, **{"ours, ms": results.get("flex"), "closure, ms": results.get("closure")})

    def errors(self, length: int) -> None:
        """Record the relative error of the output of each backend against the float32 reference."""
        bench, name = self.bench, "documents, lognormal"
        mask = masks(length)[name]
        q, k, v = self.qkv(length)
        with torch.no_grad():
            expected = attend(q.float(), k.float(), v.float(), mask, backend="reference")
        for backend in BACKENDS:
            facts = {"table": f"Error of the output against float32, {name}", "S": length, "backend": backend}
            with bench.attempt(**facts):
                out = attend(q, k, v, mask, backend=backend).detach().float()
                bench.record(**facts, **{"relative error": float((out - expected).norm() / expected.norm())})
