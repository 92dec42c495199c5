"""attend(): attention under a mask, by the backend that fits or the one that is asked for."""

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
"""By type of device, the backends that `auto` tries, fastest first; on any other device it takes sdpa."""


@dataclass(frozen=True, eq=False)  # no tuple: torch.compile would look into it and compile anew for every layout
class Lowered:
    """A mask as the layers take it: made once per forward and shared by all layers that use the mask.

    mask      what was lowered, on the CPU: the local queries over the keys that `exchange` brings
    backend   computes it
    reason    why this backend, in words for the log
    inputs    what the backend's `lower` made of the mask
    exchange  brings the keys and values that the mask indexes
    visible   bool [B, Q] on the device: False for queries that see no key (padding)
    segments  int64 [B, S] on the device: the documents of whole rows by number, for recurrent layers (see
              `sightline.masks.segments`); None where none was asked for
    """

    mask: AttentionMask
    backend: Backend
    reason: str
    inputs: Any
    exchange: Exchange
    visible: Tensor
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
    """Turn a mask into the inputs of one backend.

    exchange  where the keys come from; without it they are local
    segments  whether recurrent layers will read where documents begin

    The other options are those of `KernelRequirements`. A mask that lies on a device costs one read of it; one on the CPU none.

    Raises:
        ValueError: the backend is unknown or cannot honor the mask there; the text names those that can.
    """
    needs = KernelRequirements(
        device=torch.device(device), dtype=dtype, training=training, sinks=sinks, head_dim=head_dim
    )
    mask = mask.cpu()
    exchange = exchange or LocalExchange(mask)
    chosen, inputs, reason = _choose(mask, needs, backend)
    numbered = number_segments(exchange.full_mask).to(device, non_blocking=True) if segments else None
    return Lowered(
        mask, chosen, reason, inputs, exchange, mask.visible_queries().to(device, non_blocking=True), numbered
    )


def check_backend(backend: str, needs: KernelRequirements) -> None:
    """Refuse a backend that cannot serve such layers, whatever the mask; the error names those that can."""
    refused = [candidate.supports(needs) for candidate in find_backends(backend, needs.device)]
    if all(refused):
        raise ValueError(f"attention backend {backend!r}: {'; '.join(map(str, refused))}; {_alternatives(needs)}")


def find_backends(backend: str, device: torch.device) -> list[Backend]:
    """The backends that a choice stands for on a device, the preferred one first. On a CPU `sdpa` means `tiled`.

    Raises:
        ValueError: no such choice.
    """
    if backend not in CHOICES:
        raise ValueError(f"unknown attention backend {backend!r}; expected one of: {', '.join(CHOICES)}")
    names = AUTO.get(device.type, ("sdpa",)) if backend == "auto" else (backend,)
    if backend == "sdpa" and device.type == "cpu":
        names = ("tiled",)
    return [candidate for name in names for candidate in BACKENDS if candidate.name == name]


def _choose(mask: AttentionMask, needs: KernelRequirements, backend: str) -> tuple[Backend, Any, str]:
    """The first backend that takes the mask, its inputs, and why it was taken."""
    refused: list[str] = []
    for candidate in find_backends(backend, needs.device):
        reason = candidate.supports(needs)
        if reason is None:
            inputs = candidate.lower(mask, needs)
            if not isinstance(inputs, Unsupported):
                why = candidate.why if backend == "auto" else "it was asked for"
                return candidate, inputs, "; ".join([*refused, why])
            reason = f"{candidate.name} cannot: {inputs.reason}"
        refused.append(reason)
    raise ValueError(
        f"attention backend {backend!r} cannot honor this mask: {'; '.join(refused)}; {_alternatives(needs, mask)}"
    )


def _alternatives(needs: KernelRequirements, mask: AttentionMask | None = None) -> str:
    able = [
        backend.name
        for backend in BACKENDS
        if backend.supports(needs) is None and (mask is None or not isinstance(backend.lower(mask, needs), Unsupported))
    ]
    return f"backends that can: {', '.join(able)}"


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
    backend  one of CHOICES; only for a mask that is not lowered yet
    scale    default 1 / sqrt(D)
    sinks    [H], learned logits that take part in the softmax and carry no value (gpt-oss)

    Returns [B, H, Q, D]. A query that sees nothing gives exact zeros and receives zero gradients.

    Raises:
        ValueError: shapes that do not fit each other, or a backend that cannot honor the mask.
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
        raise ValueError(f"queries and keys must agree in B and D, got {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"query heads must be a multiple of key/value heads, got {q.shape[1]} and {k.shape[1]}")
    if mask.shape != (q.shape[0], q.shape[2], k.shape[2]):
        raise ValueError(
            f"the mask is for (B, Q, T) = {mask.shape}, but {shapes} need {(q.shape[0], q.shape[2], k.shape[2])}"
        )
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks must be [H] = [{q.shape[1]}], one logit a query head, got {tuple(sinks.shape)}")
