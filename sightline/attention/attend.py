"""attend(): attention under a mask, with the requested backend or the fastest one that supports the mask."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sightline.attention.backend import Backend, KernelRequirements, Unsupported
from sightline.attention.exchange import Exchange, LocalExchange
from sightline.attention.flex import Flex
from sightline.attention.reference import Reference
from sightline.attention.sdpa import Sdpa
from sightline.attention.tiled import Tiled
from sightline.attention.varlen import Varlen
from sightline.masks import AttentionMask
from sightline.masks.segments import number_segments

BACKENDS: tuple[Backend, ...] = (Flex(), Sdpa(), Varlen(), Tiled(), Reference())
CHOICES = ("auto", *(backend.name for backend in BACKENDS))
"""Values of the option `attention.backend`."""
AUTO = {"cpu": ("tiled",), "cuda": ("varlen", "flex")}
"""Backends that `auto` tries for each device type, fastest first; other devices use sdpa."""


@dataclass(frozen=True, eq=False)  # not a tuple, for whose contents torch.compile would recompile
class Lowered:
    """A mask prepared for one backend: built once per forward and shared by all layers that use the mask.

    mask      the AttentionMask on the CPU: local queries, and the keys that `exchange` provides
    backend   backend that computes the attention
    reason    why this backend was chosen, for the log
    inputs    kernel inputs, built by `backend.lower`
    exchange  provides the keys and values that the mask indexes
    visible   bool [B, Q] on the device: false for fully masked queries (padding); None if there are none for sure
    segments  int64 [B, S] on the device: document numbers of the full rows, for recurrent layers (see
              `sightline.masks.segments`); None if not requested
    """

    mask: AttentionMask
    backend: Backend
    reason: str
    inputs: Any
    exchange: Exchange
    visible: Tensor | None
    segments: Tensor | None = None


def lower(
    mask: AttentionMask,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    training: bool,
    backend: str = "auto",
    sinks: bool = False,
    head_dim: int | None = None,
    exchange: Exchange | None = None,
    segments: bool = False,
) -> Lowered:
    """Choose a backend for a mask and build its kernel inputs.

    backend   one of CHOICES
    exchange  provides the keys under context parallelism; default: all keys are local
    segments  whether to number the documents for recurrent layers

    The other options are those of `KernelRequirements`. A mask on a GPU costs one synchronization, one on the CPU none.

    Raises:
        ValueError: if the backend is unknown or does not support the mask; the message lists the backends that do.
    """
    requirements = KernelRequirements(
        device=torch.device(device), dtype=dtype, training=training, sinks=sinks, head_dim=head_dim
    )
    mask = mask.cpu()
    exchange = exchange or LocalExchange(mask)
    chosen, inputs, reason = _choose(mask, requirements, backend)
    document_numbers = number_segments(exchange.full_mask).to(device, non_blocking=True) if segments else None
    return Lowered(
        mask, chosen, reason, inputs, exchange, mask.visible_queries().to(device, non_blocking=True), document_numbers
    )


def check_backend(backend: str, requirements: KernelRequirements) -> None:
    """Check that a backend supports the requirements of attention layers, before any mask is known.

    Raises:
        ValueError: if it does not; the message lists the backends that do.
    """
    unsupported = [candidate.supports(requirements) for candidate in find_backends(backend, requirements.device)]
    if all(unsupported):
        reasons = "; ".join(map(str, unsupported))
        raise ValueError(
            f"attention backend (--attention.backend) {backend!r}: {reasons}; {_alternatives(requirements)}"
        )


def find_backends(backend: str, device: torch.device) -> list[Backend]:
    """Return the backends that a choice selects on a device, in order of preference. On a CPU `sdpa` selects `tiled`.

    Raises:
        ValueError: if the choice is unknown.
    """
    if backend not in CHOICES:
        raise ValueError(f"unknown attention backend {backend!r}; expected one of: {', '.join(CHOICES)}")
    names = AUTO.get(device.type, ("sdpa",)) if backend == "auto" else (backend,)
    if backend == "sdpa" and device.type == "cpu":
        names = ("tiled",)
    return [candidate for name in names for candidate in BACKENDS if candidate.name == name]


def _choose(mask: AttentionMask, requirements: KernelRequirements, backend: str) -> tuple[Backend, Any, str]:
    """Return the first backend that supports the mask, its kernel inputs, and the reason for the choice."""
    unsupported: list[str] = []
    for candidate in find_backends(backend, requirements.device):
        reason = candidate.supports(requirements)
        if reason is None:
            inputs = candidate.lower(mask, requirements)
            if not isinstance(inputs, Unsupported):
                why = candidate.why if backend == "auto" else "it was requested"
                return candidate, inputs, "; ".join([*unsupported, why])
            reason = f"{candidate.name} does not support this mask: {inputs.reason}"
        unsupported.append(reason)
    raise ValueError(
        f"attention backend {backend!r} does not support this mask: {'; '.join(unsupported)}; "
        f"{_alternatives(requirements, mask)}"
    )


def _alternatives(requirements: KernelRequirements, mask: AttentionMask | None = None) -> str:
    supported = [
        backend.name
        for backend in BACKENDS
        if backend.supports(requirements) is None
        and (mask is None or not isinstance(backend.lower(mask, requirements), Unsupported))
    ]
    return f"supported backends: {', '.join(supported)}"


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
    """Compute softmax(scale * q k') v over the keys that each query attends to: [B, H, Q, D].

    q        [B, H, Q, D]
    k, v     [B, G, T, D], with H a multiple of G: query head h uses key/value head h // (H / G)
    mask     AttentionMask of (B, Q, T), or the result of `lower` to share the kernel inputs between layers
    backend  one of CHOICES; ignored if `mask` is already lowered
    scale    default 1 / sqrt(D)
    sinks    [H], learned logits that are part of the softmax but have no value (gpt-oss)

    A fully masked query has an output of exact zeros and zero gradients.

    Raises:
        ValueError: if shapes are inconsistent, or the backend does not support the mask.
    """
    _check_shapes(q, k, v, mask.mask if isinstance(mask, Lowered) else mask, sinks)
    if not isinstance(mask, Lowered):
        inputs = (q, k, v) if sinks is None else (q, k, v, sinks)
        training = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        mask = lower(
            mask,
            backend=backend,
            device=q.device,
            dtype=q.dtype,
            training=training,
            sinks=sinks is not None,
            head_dim=q.shape[-1],
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return mask.backend.attend(q, k, v, mask.inputs, scale, sinks)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, sinks: Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(f"expected q [B, H, Q, D] and k, v [B, G, T, D], got {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"queries and keys must have the same B and D, got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {q.shape[1]} and {k.shape[1]}")
    if mask.shape != (q.shape[0], q.shape[2], k.shape[2]):
        raise ValueError(
            f"the mask is for (B, Q, T) = {mask.shape}, but {shapes} need {(q.shape[0], q.shape[2], k.shape[2])}"
        )
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must be [H] = [{q.shape[1]}], one logit per query head, got {tuple(sinks.shape)}")
