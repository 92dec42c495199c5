"""PyTorch's fused attention: tile by tile on a CPU, where any interval mask trains, and as one call on a GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from sightline.masks import AttentionMask
from sightline.masks.tiles import Segment
from sightline.torch_private import disable_compiler

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

CPU = "cpu"  # where attention is computed tile by tile

# The order in which CUDA's kernels are tried, fastest first.
PRIORITY = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


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
    has_unseeing: bool


class Dense(NamedTuple):
    """A mask for other devices: plain causal over whole rows, or bool [B, 1, Q, T] and the queries that see nothing."""

    visible: Tensor | None
    unseeing: Tensor | None


def refusal(mask: AttentionMask, device: torch.device, dtype: torch.dtype, training: bool) -> str | None:
    return None


def lower(mask: AttentionMask, device: torch.device, dtype: torch.dtype, training: bool) -> Tiles | Dense:
    return _lower_tiles(mask, dtype) if device.type == CPU else _lower_dense(mask, device)


def attend(q: Tensor, k: Tensor, v: Tensor, form: Tiles | Dense, scale: float, sinks: Tensor | None) -> Tensor:
    if isinstance(form, Tiles):
        return _attend_tiles(q, k, v, form, scale, sinks)
    return _attend_dense(q, k, v, form, scale, sinks)


@disable_compiler
def _attend_tiles(q: Tensor, k: Tensor, v: Tensor, form: Tiles, scale: float, sinks: Tensor | None) -> Tensor:
    return _TiledAttention.apply(q, k, v, sinks, form, scale)


def _lower_tiles(mask: AttentionMask, dtype: torch.dtype) -> Tiles:
    tiles = mask.to_tiles()
    biases: dict[int, Tensor] = {}  # tiles of a sliding window share one pattern, so they share one bias

    def to_slice(segment: Segment) -> Slice:
        pattern, bias = segment.pattern, None
        if pattern is not None:
            if id(pattern) not in biases:
                # Not -inf: where a query sees no key of this slice, the kernel would call its log-sum-exp 0. A number
                # as low as this gives every hidden key a weight of exactly 0, and such a slice as well.
                hidden = torch.zeros(pattern.shape, dtype=dtype).masked_fill_(~pattern, torch.finfo(dtype).min / 2)
                biases[id(pattern)] = hidden[None, None]
            bias = biases[id(pattern)]
        return Slice(segment.first, segment.last, segment.causal, bias)

    lowered = [(t.row, t.first, t.last, [to_slice(s) for s in t.segments]) for t in tiles]
    covered = sum(t.last - t.first for t in tiles)
    return Tiles(lowered, covered < mask.shape[0] * mask.shape[1])


class _TiledAttention(torch.autograd.Function):
    """Attention over tiles with PyTorch's fused CPU kernels, forward and backward.

    A tile with several slices of keys joins their results by their log-sum-exp, as FlashAttention joins its blocks
    (Dao et al. 2022, arXiv:2205.14135, section 3.1). The backward kernel rebuilds the weights of a slice from the
    log-sum-exp, so given that of *all* slices it returns the exact gradients of its own. For the same reason a sink
    needs no key: it only raises the log-sum-exp and scales the output; with p its weight and delta = sum(dO * O) the
    gradient of its logit is -sum(p * delta).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, form: Tiles, scale: float) -> Tensor:
        out = torch.zeros_like(q) if form.has_unseeing else torch.empty_like(q)
        lse = torch.zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        heads = k.shape[1]
        for row, first, last, slices in form.tiles:
            query = _grouped(q[row, :, first:last], heads)
            parts = [
                _forward(
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
        ctx.form, ctx.scale = form, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        d_q = torch.zeros_like(q) if ctx.form.has_unseeing else torch.empty_like(q)
        d_k, d_v = torch.zeros_like(k), torch.zeros_like(v)
        heads = k.shape[1]
        for row, first, last, slices in ctx.form.tiles:
            query, grad, result = (_grouped(x[row, :, first:last], heads) for x in (q, d_out, out))
            total = _grouped(lse[row, :, first:last], heads)
            target = d_q[row, :, first:last]
            for number, s in enumerate(slices):
                key, value = _shared(k, row, s, query), _shared(v, row, s, query)
                d_query, d_key, d_value = _backward(
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


def _lower_dense(mask: AttentionMask, device: torch.device) -> Dense:
    _, queries, keys = mask.shape
    mask = mask.to(device)
    if mask.intervals == 1 and queries == keys:
        index = torch.arange(1, queries + 1, dtype=torch.int32, device=device)
        if bool((mask.start == 0).all()) and bool((mask.stop[..., 0] == index).all()):
            return Dense(None, None)
    visible = mask.to_dense().unsqueeze(1)
    unseeing = ~visible.any(dim=3, keepdim=True)
    # A query that sees nothing would turn to NaN: it sees the first key, and its output is taken away again.
    visible[..., :1] |= unseeing
    return Dense(visible, unseeing if bool(unseeing.any()) else None)


def _attend_dense(q: Tensor, k: Tensor, v: Tensor, form: Dense, scale: float, sinks: Tensor | None) -> Tensor:
    bias = form.visible
    if sinks is not None:
        k, v, bias = _with_sink_key(q, k, v, form, sinks)
    with sdpa_kernel(PRIORITY, set_priority=True):
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=bias is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return out if form.unseeing is None else out.masked_fill(form.unseeing, 0.0)


def _with_sink_key(q: Tensor, k: Tensor, v: Tensor, form: Dense, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One more key of zeros, whose score is the sink, with a value of zeros: keys, values and the scores' bias."""
    rows, heads, queries, _ = q.shape
    hidden = torch.zeros(rows, 1, queries, k.shape[2], dtype=q.dtype, device=q.device)
    if form.visible is None:
        visible = torch.ones(queries, k.shape[2], dtype=torch.bool, device=q.device).tril()
    else:
        visible = form.visible
    hidden = hidden.masked_fill(~visible, float("-inf")).expand(-1, heads, -1, -1)
    column = sinks.to(q.dtype).view(1, heads, 1, 1).expand(rows, -1, queries, 1)
    return F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), torch.cat([hidden, column], dim=3)
