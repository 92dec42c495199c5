"""A dense implementation of attention as reference for the native kernel, and comparison with it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sightline.attention import KernelRequirements
from sightline.attention.native import Native
from sightline.masks import AttentionMask
from sightline.native import why_missing

needs_native = pytest.mark.skipif(why_missing() is not None, reason=f"native is not built: {why_missing()}")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
FLOAT32 = KernelRequirements(device=torch.device("cpu"), dtype=torch.float32, training=True)


def native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute attention with the native backend."""
    backend = Native()
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return backend.attend(q, k, v, backend.lower(mask, FLOAT32), scale, sinks, softcap)


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    scale: float | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Compute attention with the full score matrix in float64."""
    visible = mask.to_dense()[:, None]
    group = q.shape[1] // max(1, k.shape[1])
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q.shape[3] ** -0.5 if scale is None else scale) * (q.double() @ keys.mT)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~visible, -1e300)
    if sinks is not None:
        weights = torch.cat([weights, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=3)
    weights = weights.softmax(dim=3)[..., : k.shape[2]]
    return weights.masked_fill(~visible, 0.0) @ values


def random_inputs(
    mask: AttentionMask,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (8, 8),
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    """Leaf tensors q, k, v in the layout of a model: [B, S, heads, D] viewed as [B, heads, S, D].

    heads  query heads and key/value heads
    dims   head_dim of queries and keys, and of values
    """
    generator = torch.Generator().manual_seed(seed)
    rows, queries, keys = mask.shape
    shapes = [(rows, queries, heads[0], dims[0]), (rows, keys, heads[1], dims[0]), (rows, keys, heads[1], dims[1])]
    made = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]
    return [x.requires_grad_() for x in made]


def assert_equals_dense(
    mask: AttentionMask, leaves: Sequence[Tensor], sinks: Tensor | None = None, softcap: float | None = None
) -> list[Tensor]:
    """Check the output and all gradients of the native kernel against `dense`; return them."""
    wanted = [*leaves, *([] if sinks is None else [sinks])]
    out, expected = (f(*leaves, mask, sinks=sinks, softcap=softcap) for f in (native, dense))
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    found = [out, *torch.autograd.grad(out, wanted, cotangent)]
    exact = [expected, *torch.autograd.grad(expected, wanted, cotangent.double())]
    for one, other, like in zip(found, exact, [out, *wanted], strict=True):
        assert one.dtype == like.dtype
        tolerance = TOLERANCE[leaves[0].dtype]
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)
    return found
