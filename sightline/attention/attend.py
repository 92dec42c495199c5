"""attend(): attention under a mask, by the backend that fits or the one that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sightline.attention import flex, reference, sdpa, varlen
from sightline.masks import AttentionMask

Backend = Literal["auto", "flex", "sdpa", "varlen", "reference"]

# Each backend is a module of three functions: refusal (why it cannot honour a mask, or None), lower and attend.
BACKENDS: dict[str, Any] = {"flex": flex, "sdpa": sdpa, "varlen": varlen, "reference": reference}


@dataclass(frozen=True)
class Lowered:
    """A mask in the form one backend takes: made once per forward and shared by all layers that use the mask.

    mask     what was lowered
    backend  the backend that will compute it
    reason   why it was chosen, in words for the log
    form     what that backend's `lower` made of the mask
    """

    mask: AttentionMask
    backend: str
    reason: str
    form: Any

    def gather(self, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """See AttentionMask.gather."""
        return self.mask.gather(*tensors)


def choose_backend(mask: AttentionMask, device: torch.device, dtype: torch.dtype, training: bool) -> tuple[str, str]:
    """What `auto` takes, and why.

    On a CPU only sdpa is both fast and able to train. On CUDA varlen is the fastest kernel where it can say the mask;
    flex honours every other one. Other devices have sdpa.
    """
    if device.type == "cpu":
        return "sdpa", "on a CPU it is the fast backend that trains, tile by tile"
    if device.type != "cuda":
        return "sdpa", f"flex and varlen do not run on {device.type}"
    refused = varlen.refusal(mask, device, dtype, training)
    if refused is None:
        return "varlen", "the mask is documents with at most one window, in half precision on CUDA"
    return "flex", f"varlen cannot: {refused}"


def lower(
    mask: AttentionMask,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    training: bool,
    backend: str = "auto",
) -> Lowered:
    """Turn a mask into what one backend eats.

    device, dtype  of the queries it will meet
    training       whether gradients will be asked for

    Errors: ValueError when the backend is unknown or cannot honour the mask there; the text names those that can.
    """
    device = torch.device(device)
    reason = "it was asked for"
    if backend == "auto":
        backend, reason = choose_backend(mask, device, dtype, training)
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; there are: {', '.join(get_args(Backend))}")
    refused = BACKENDS[backend].refusal(mask, device, dtype, training)
    if refused is not None:
        raise ValueError(f"attention backend {backend!r} cannot honour this mask: {refused}")
    return Lowered(mask, backend, reason, BACKENDS[backend].lower(mask, device, dtype, training))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask | Lowered,
    *,
    backend: str = "auto",
    scale: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q k') v over the keys each query sees.

    q        [B, H, Q, D]
    k, v     [B, G, T, D], G dividing H: query head h reads key head h // (H / G)
    mask     an AttentionMask of (B, Q, T), lowered here, or one lowered before (see `lower`) to serve many layers
    backend  auto, flex, sdpa, varlen or reference; only for a mask that is not lowered yet
    scale    default 1 / sqrt(D)
    sinks    [H], learned logits that take part in the softmax and carry no value (gpt-oss)

    Returns [B, H, Q, D]. A query that sees nothing gives exact zeros and receives zero gradients.
    Errors: ValueError for shapes that do not fit each other, or a backend that cannot honour the mask.
    """
    facts = mask.mask if isinstance(mask, Lowered) else mask
    _check_shapes(q, k, v, facts, sinks)
    if not isinstance(mask, Lowered):
        inputs = (q, k, v) if sinks is None else (q, k, v, sinks)
        training = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        mask = lower(mask, device=q.device, dtype=q.dtype, training=training, backend=backend)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return BACKENDS[mask.backend].attend(q, k, v, mask.form, scale, sinks)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, sinks: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"expected q [B, H, Q, D] and k, v [B, G, T, D], got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"queries and keys must agree in B and D, got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {q.shape[1]} and {k.shape[1]}")
    if mask.shape != (q.shape[0], q.shape[2], k.shape[2]):
        raise ValueError(
            f"the mask is for (B, Q, T) = {mask.shape}, but {shapes} need {(q.shape[0], q.shape[2], k.shape[2])}"
        )
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must be [H] = [{q.shape[1]}], one logit a query head, got {tuple(sinks.shape)}")
