"""Inputs and results of `attend`, and the backends to compare with `reference` on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sightline.attention import BACKENDS, KernelRequirements, attend
from sightline.masks import AttentionMask


def inputs(
    mask: AttentionMask,
    heads: int,
    kv_heads: int,
    size: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    value_dim: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Leaf tensors q, k, v in the layout of a model: [B, S, heads, D] viewed as [B, heads, S, D]."""
    generator = torch.Generator().manual_seed(seed)
    rows, queries, keys = mask.shape
    shapes = [(rows, queries, heads, size), (rows, keys, kv_heads, size), (rows, keys, kv_heads, value_dim or size)]
    q, k, v = (torch.randn(shape, generator=generator, dtype=dtype).transpose(1, 2) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def results(
    backend: str, mask: AttentionMask, leaves: tuple[Tensor, ...], sinks: Tensor | None, **options: Any
) -> list[Tensor]:
    """Output, and gradients of all leaves for a fixed random cotangent."""
    out = attend(*leaves, mask, backend=backend, sinks=sinks, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    leaves_and_sinks = leaves if sinks is None else (*leaves, sinks)
    return [out, *torch.autograd.grad(out, leaves_and_sinks, cotangent)]


def fast_backends(dtypes: tuple[torch.dtype, ...] = (torch.float64, torch.float32), **needs: Any) -> list[str]:
    """Names of the backends other than `reference` that train on this CPU with one of the dtypes; `sdpa` is `tiled`."""
    cpu = torch.device("cpu")
    return [
        backend.name
        for backend in BACKENDS
        if backend.name not in ("reference", "sdpa")
        and any(
            backend.supports(KernelRequirements(device=cpu, dtype=dtype, training=True, **needs)) is None
            for dtype in dtypes
        )
    ]


def precision_of(backend: str) -> tuple[torch.dtype, float]:
    """The widest dtype that a backend supports, and the tolerance of its results."""
    if backend == "reference" or backend in fast_backends((torch.float64,)):
        return torch.float64, 1e-10
    return torch.float32, 2e-5


def assert_equals_reference(
    backend: str,
    mask: AttentionMask,
    heads: int = 4,
    kv_heads: int = 2,
    *,
    sinks: Tensor | None = None,
    value_dim: int | None = None,
    **options: Any,
) -> None:
    """Compare outputs and gradients of a backend with those of `reference` in float64."""
    leaves = inputs(mask, heads, kv_heads, value_dim=value_dim)
    dtype, tolerance = precision_of(backend)
    lower_precision = tuple(x.detach().to(dtype).requires_grad_() for x in leaves)
    expected = results("reference", mask, leaves, sinks, **options)
    for one, other in zip(results(backend, mask, lower_precision, sinks, **options), expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)
