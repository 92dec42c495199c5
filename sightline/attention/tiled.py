"""The CPU backend: attention in tiles with PyTorch's fused CPU kernels, for any mask, forward and backward."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.attention.backend import KernelRequirements
from sightline.attention.first_order import check_no_transforms, first_order
from sightline.attention.tiles import Segment, build_tiles
from sightline.attention.torch_private import flash_backward, flash_forward
from sightline.masks import AttentionMask
from sightline.torch_private import disable_compiler


class Slice(NamedTuple):
    """Keys `[first, last)` of a tile, and the bias of their scores: float [1, 1, queries or 1, keys], or None."""

    first: int
    last: int
    causal: bool
    bias: Tensor | None


@dataclass(frozen=True)  # not a tuple, for whose contents torch.compile would recompile
class Tiles:
    """Tiles of a mask.

    tiles       (row, first query, end of queries, slices, `Tile.fully_masked`)
    covers_all  whether every query is in a tile
    """

    tiles: list[tuple[int, int, int, list[Slice], Tensor | None]]
    covers_all: bool


class Tiled:
    name = "tiled"
    why = "it trains on a CPU with PyTorch's fused kernels"

    def supports(self, requirements: KernelRequirements) -> str | None:
        device = requirements.device.type
        if device != "cpu":
            return f"tiled runs on a CPU only, got device {device}"
        return "tiled does not support softcap" if requirements.softcap else None

    def lower(self, mask: AttentionMask, requirements: KernelRequirements) -> Tiles:
        tiles = build_tiles(mask.start, mask.stop)
        dtype = requirements.dtype
        biases: dict[int, Tensor] = {}  # by pattern: tiles of a sliding window share one

        def to_slice(segment: Segment) -> Slice:
            pattern, bias = segment.pattern, None
            if pattern is not None:
                if id(pattern) not in biases:
                    # Not -inf: for a query that attends to no key of this slice, the kernel would return a
                    # log-sum-exp of 0. This value gives masked keys, and such a slice, a weight of exactly 0.
                    zeros = torch.zeros(pattern.shape, dtype=dtype)
                    biases[id(pattern)] = zeros.masked_fill_(~pattern, torch.finfo(dtype).min / 2)[None, None]
                bias = biases[id(pattern)]
            return Slice(segment.first, segment.last, segment.causal, bias)

        lowered = [(t.row, t.first, t.last, [to_slice(s) for s in t.segments], t.fully_masked) for t in tiles]
        covered = sum(t.last - t.first for t in tiles)
        return Tiles(lowered, covered == mask.shape[0] * mask.shape[1])

    @disable_compiler
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: Tiles, scale: float, sinks: Tensor | None, softcap: float | None
    ) -> Tensor:
        check_no_transforms(self.name, q, k, v, sinks)
        return _TiledAttention.apply(q, k, v, sinks, inputs, scale)


class _TiledAttention(torch.autograd.Function):
    """Attention over tiles with PyTorch's fused CPU kernels, forward and backward.

    The results of a tile's slices are merged by their log-sum-exp, as FlashAttention merges its blocks
    (Dao et al. 2022, arXiv:2205.14135, section 3.1). The backward kernel recomputes the weights of a slice from the
    log-sum-exp; given that of *all* slices, it returns the exact gradients of this slice. For the same reason a sink
    needs no key: it increases the log-sum-exp and scales the output. With p the weight of the sink and
    delta = sum(dO * O), the gradient of its logit is -sum(p * delta).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, inputs: Tiles, scale: float) -> Tensor:
        head_dim, value_dim = q.shape[3], v.shape[3]
        size = max(head_dim, value_dim)
        out = _empty_output(q, value_dim)
        if not inputs.covers_all:
            out.zero_()
        # An infinite log-sum-exp gives fully masked queries weights, and gradients, of exactly 0.
        lse = torch.full(q.shape[:3], torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        heads = k.shape[1]
        for row, first, last, slices, fully_masked in inputs.tiles:
            query = _pad(_grouped(q[row, :, first:last], heads), size)
            results = [
                flash_forward(
                    query, _expanded(k, row, s, query), _expanded(v, row, s, query), 0.0, s.causal,
                    attn_mask=s.bias, scale=scale,
                )
                for s in slices
            ]  # fmt: skip
            merged, total = functools.reduce(_merge, results)
            if sinks is not None:
                sink = sinks.to(total.dtype).view(heads, -1, 1)
                with_sink = torch.logaddexp(total, sink)
                merged, total = merged * (total - with_sink).exp_().unsqueeze(3), with_sink
            if fully_masked is not None:
                merged = merged.masked_fill(fully_masked[:, None], 0.0)
                total = total.masked_fill(fully_masked, torch.inf)
            out[row, :, first:last] = merged[..., :value_dim].flatten(0, 1)
            lse[row, :, first:last] = total.flatten(0, 1)
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.inputs, ctx.scale = inputs, scale
        return out

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        raise ValueError("attention backend 'tiled' has no forward-mode derivative; use backend='reference'")

    @staticmethod
    @first_order("tiled")
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        d_q = torch.zeros_like(q) if not ctx.inputs.covers_all else torch.empty_like(q)
        d_k, d_v = torch.zeros_like(k), torch.zeros_like(v)
        heads, head_dim, value_dim = k.shape[1], q.shape[3], v.shape[3]
        size = max(head_dim, value_dim)
        for row, first, last, slices, _ in ctx.inputs.tiles:
            query, grad, result = (_pad(_grouped(x[row, :, first:last], heads), size) for x in (q, d_out, out))
            total = _grouped(lse[row, :, first:last], heads)
            target = d_q[row, :, first:last]
            for number, s in enumerate(slices):
                key, value = _expanded(k, row, s, query), _expanded(v, row, s, query)
                d_query, d_key, d_value = flash_backward(
                    grad, query, key, value, result, total, 0.0, s.causal, attn_mask=s.bias, scale=ctx.scale
                )
                d_query = d_query[..., :head_dim].flatten(0, 1)
                if number == 0:
                    target.copy_(d_query)
                else:
                    target += d_query
                d_k[row, :, s.first : s.last] += d_key[..., :head_dim].sum(dim=1)
                d_v[row, :, s.first : s.last] += d_value[..., :value_dim].sum(dim=1)
        d_sinks = None
        if sinks is not None:
            delta = (d_out * out).sum(dim=3, dtype=lse.dtype)
            weight = (sinks.to(lse.dtype).view(1, -1, 1) - lse).exp_()
            d_sinks = -(weight * delta).sum(dim=(0, 2)).to(sinks.dtype)
        return d_q, d_k, d_v, d_sinks, None, None


def _grouped(x_Hn: Tensor, heads: int) -> Tensor:
    """Group the query heads that share a key/value head: view of [H, n, ...] as [G, H / G, n, ...]."""
    return x_Hn.unflatten(0, (heads, -1))


def _expanded(x: Tensor, row: int, s: Slice, query: Tensor) -> Tensor:
    """Expand the keys or values of a slice to all query heads of a group: [G, H / G, keys, channels of the query]."""
    return _pad(x[row, :, s.first : s.last], query.shape[3]).unsqueeze(1).expand(-1, query.shape[1], -1, -1)


def _pad(x: Tensor, size: int) -> Tensor:
    """Append channels of zeros: the kernels need one size for queries, keys and values."""
    return F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x


def _empty_output(q: Tensor, value_dim: int) -> Tensor:
    """Return an empty [B, H, Q, Dv] with the dimensions in the same memory order as in the queries."""
    if q.shape[3] == value_dim:
        return torch.empty_like(q)
    rows, heads, queries, _ = q.shape
    if q.stride(1) > q.stride(2):
        return q.new_empty(rows, heads, queries, value_dim)
    return q.new_empty(rows, queries, heads, value_dim).transpose(1, 2)


def _merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merge the attention over two sets of keys: outputs [G, R, n, D] and log-sum-exps [G, R, n]."""
    total = torch.logaddexp(one[1], other[1])
    weights = [(lse - total).exp_().unsqueeze(3) for _, lse in (one, other)]
    return one[0] * weights[0] + other[0] * weights[1], total
