"""The CPU kernel: attention tile by tile on PyTorch's fused CPU operators, for any interval mask, with gradients."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sightline.attention.backend import KernelRequirements
from sightline.attention.tiles import Segment, build_tiles
from sightline.attention.torch_private import flash_backward, flash_forward
from sightline.masks import AttentionMask
from sightline.torch_private import disable_compiler


class Slice(NamedTuple):
    """Keys `[first, last)` of a tile, and what is added to their scores: float [1, 1, queries, keys] or nothing."""

    first: int
    last: int
    causal: bool
    bias: Tensor | None


@dataclass(frozen=True)  # no tuple: torch.compile would look into it and compile anew for every layout
class Tiles:
    """A mask for the CPU: (row, first query, end of queries, slices), and whether any query lies in no tile."""

    tiles: list[tuple[int, int, int, list[Slice]]]
    has_fully_masked: bool


class Tiled:
    name = "tiled"
    why = "on a CPU it is the fast backend that trains, tile by tile"

    def supports(self, needs: KernelRequirements) -> str | None:
        return None if needs.device.type == "cpu" else f"tiled runs on a CPU, and this is {needs.device.type}"

    def lower(self, mask: AttentionMask, needs: KernelRequirements) -> Tiles:
        tiles = build_tiles(mask.start, mask.stop)
        biases: dict[int, Tensor] = {}  # tiles of a sliding window share one pattern, so they share one bias

        def to_slice(segment: Segment) -> Slice:
            pattern, bias = segment.pattern, None
            if pattern is not None:
                if id(pattern) not in biases:
                    # Not -inf: where a query sees no key of this slice, the kernel would call its log-sum-exp 0. A
                    # number as low as this gives every hidden key a weight of exactly 0, and such a slice as well.
                    shown = torch.zeros(pattern.shape, dtype=needs.dtype)
                    biases[id(pattern)] = shown.masked_fill_(~pattern, torch.finfo(needs.dtype).min / 2)[None, None]
                bias = biases[id(pattern)]
            return Slice(segment.first, segment.last, segment.causal, bias)

        lowered = [(t.row, t.first, t.last, [to_slice(s) for s in t.segments]) for t in tiles]
        covered = sum(t.last - t.first for t in tiles)
        return Tiles(lowered, covered < mask.shape[0] * mask.shape[1])

    @disable_compiler
    def attend(self, q: Tensor, k: Tensor, v: Tensor, inputs: Tiles, scale: float, sinks: Tensor | None) -> Tensor:
        return _TiledAttention.apply(q, k, v, sinks, inputs, scale)


class _TiledAttention(torch.autograd.Function):
    """Attention over tiles with PyTorch's fused CPU kernels, forward and backward.

    A tile with several slices of keys joins their results by their log-sum-exp, as FlashAttention joins its blocks
    (Dao et al. 2022, arXiv:2205.14135, section 3.1). The backward kernel rebuilds the weights of a slice from the
    log-sum-exp, so given that of *all* slices it returns the exact gradients of its own. For the same reason a sink
    needs no key: it only raises the log-sum-exp and scales the output; with p its weight and delta = sum(dO * O) the
    gradient of its logit is -sum(p * delta).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, inputs: Tiles, scale: float) -> Tensor:
        out = torch.zeros_like(q) if inputs.has_fully_masked else torch.empty_like(q)
        lse = torch.zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        heads = k.shape[1]
        for row, first, last, slices in inputs.tiles:
            query = _grouped(q[row, :, first:last], heads)
            parts = [
                flash_forward(
                    query, _shared(k, row, s, query), _shared(v, row, s, query), 0.0, s.causal,
                    attn_mask=s.bias, scale=scale,
                )
                for s in slices
            ]  # fmt: skip
            joined, total = functools.reduce(_join, parts)
            if sinks is not None:
                sink = sinks.to(total.dtype).view(heads, -1, 1)
                with_sink = torch.logaddexp(total, sink)
                joined, total = joined * (total - with_sink).exp_().unsqueeze(3), with_sink
            out[row, :, first:last] = joined.flatten(0, 1)
            lse[row, :, first:last] = total.flatten(0, 1)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.inputs, ctx.scale = inputs, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        d_q = torch.zeros_like(q) if ctx.inputs.has_fully_masked else torch.empty_like(q)
        d_k, d_v = torch.zeros_like(k), torch.zeros_like(v)
        heads = k.shape[1]
        for row, first, last, slices in ctx.inputs.tiles:
            query, grad, result = (_grouped(x[row, :, first:last], heads) for x in (q, d_out, out))
            total = _grouped(lse[row, :, first:last], heads)
            target = d_q[row, :, first:last]
            for number, s in enumerate(slices):
                key, value = _shared(k, row, s, query), _shared(v, row, s, query)
                d_query, d_key, d_value = flash_backward(
                    grad, query, key, value, result, total, 0.0, s.causal, attn_mask=s.bias, scale=ctx.scale
                )
                if number == 0:
                    target.copy_(d_query.flatten(0, 1))
                else:
                    target += d_query.flatten(0, 1)
                d_k[row, :, s.first : s.last] += d_key.sum(dim=1)
                d_v[row, :, s.first : s.last] += d_value.sum(dim=1)
        d_sinks = None
        if sinks is not None:
            # out is zero where a query sees nothing, so such a query moves no sink.
            delta = (d_out * out).sum(dim=3, dtype=lse.dtype)
            weight = (sinks.to(lse.dtype).view(1, -1, 1) - lse).exp_()
            d_sinks = -(weight * delta).sum(dim=(0, 2)).to(sinks.dtype)
        return d_q, d_k, d_v, d_sinks, None, None


def _grouped(x_Hn: Tensor, heads: int) -> Tensor:
    """[H, n, ...] as [G, H / G, n, ...]: the query heads that share a key head, side by side. A view."""
    return x_Hn.unflatten(0, (heads, -1))


def _shared(x: Tensor, row: int, s: Slice, query: Tensor) -> Tensor:
    """Keys or values of a slice as [G, H / G, keys, D], one head seen by all its query heads. A view."""
    return x[row, :, s.first : s.last].unsqueeze(1).expand(-1, query.shape[1], -1, -1)


def _join(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each: outputs [G, R, n, D] and log-sum-exps [G, R, n]."""
    total = torch.logaddexp(one[1], other[1])
    weights = [(lse - total).exp_().unsqueeze(3) for _, lse in (one, other)]
    return one[0] * weights[0] + other[0] * weights[1], total
