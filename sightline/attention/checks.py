"""Checks of the arguments of `attend`, with an error that names the value, what was expected, and the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sightline.masks import AttentionMask

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_tensors(q: Any, k: Any, v: Any, sinks: Any) -> None:
    """Check that the inputs are dense floating-point tensors on one device.

    Raises:
        ValueError: if they are not.
    """
    tensors = {"q": q, "k": k, "v": v} | ({} if sinks is None else {"sinks": sinks})
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.layout != torch.strided or x.is_nested:
            raise ValueError(
                f"{name} must be a dense tensor, got layout {x.layout}; for documents of different lengths, pack them "
                "into rows and use the mask `causal(...) & document(ids)`"
            )
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}; convert it")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}; move it there")


def check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Check that queries, keys and values have one dtype. Sinks may have another.

    Raises:
        ValueError: if they do not.
    """
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k and v must have one dtype, got q {q.dtype}, k {k.dtype}, v {v.dtype}; convert them to one, or use "
            "torch.autocast"
        )


def check_mask_type(mask: Any, expected: tuple[type, ...]) -> None:
    """Check the type of a mask.

    Raises:
        ValueError: if it is none of the expected types; the message says how to make a mask from what was given.
    """
    if isinstance(mask, expected):
        return
    if mask is None:
        remedy = "for full attention use AttentionMask.from_dense(torch.ones(B, Q, T, dtype=torch.bool)), else causal()"
    elif isinstance(mask, Mapping):
        remedy = f"pass one of the masks: {', '.join(map(repr, mask))}"
    elif isinstance(mask, Tensor):
        remedy = "convert a bool [B, Q, T] with AttentionMask.from_dense"
    elif isinstance(mask, BlockMask):
        remedy = "convert its mask_mod with AttentionMask.from_mask_mod"
    else:
        remedy = "see sightline.masks for the rules that make masks"
    raise ValueError(f"mask must be an AttentionMask, got {type(mask).__name__}; {remedy}")


def check_numbers(scale: Any, softcap: Any) -> None:
    """Check that `scale` is a finite number or None, and `softcap` a finite number greater than 0 or None.

    Raises:
        ValueError: if they are not.
    """
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number or None, got {value!r}; convert a tensor with .item()")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap must be greater than 0, got {softcap!r}; use None for no soft cap")


def check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, sinks: Tensor | None) -> None:
    """Check that the shapes fit together.

    Raises:
        ValueError: if they do not.
    """
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"expected q [B, H, Q, D], k [B, G, T, D] and v [B, G, T, Dv], got {_shapes(q, k, v)}")
    (rows, heads, queries, dim), (key_rows, kv_heads, keys, key_dim) = q.shape, k.shape
    if rows != key_rows or dim != key_dim:
        raise ValueError(f"queries and keys must have the same B and D, got {_shapes(q, k, v)}")
    if 0 in (heads, kv_heads, dim, v.shape[3]):
        raise ValueError(f"heads and channels must be at least 1, got {_shapes(q, k, v)}")
    if heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {heads} and {kv_heads}")
    if mask.shape != (rows, queries, keys):
        raise ValueError(
            f"the mask is for (B, Q, T) = {mask.shape}, but {_shapes(q, k, v)} need {(rows, queries, keys)}"
        )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must be [H] = [{heads}], one logit per query head, got {tuple(sinks.shape)}")


def _shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    return f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
