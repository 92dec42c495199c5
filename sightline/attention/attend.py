"""attend(): attention under a mask, with the requested backend or the fastest one that supports the mask."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sightline.attention.backend import Backend, KernelRequirements, Unsupported
from sightline.attention.checks import check_dtypes, check_mask_type, check_numbers, check_shapes, check_tensors
from sightline.attention.exchange import Exchange, LocalExchange
from sightline.attention.flex import Flex
from sightline.attention.native import Native
from sightline.attention.reference import Reference
from sightline.attention.sdpa import Sdpa
from sightline.attention.tiled import Tiled
from sightline.attention.varlen import Varlen
from sightline.masks import AttentionMask
from sightline.masks.segments import number_segments
from sightline.precision import autocast_dtype

BACKENDS: tuple[Backend, ...] = (Flex(), Sdpa(), Varlen(), Native(), Tiled(), Reference())
CHOICES = ("auto", *(backend.name for backend in BACKENDS))
"""Values of the option `attention.backend`."""
AUTO = {"cpu": ("native", "tiled"), "cuda": ("varlen", "flex")}
"""Backends that `auto` tries for each device type, fastest first; other devices use sdpa."""


@dataclass(frozen=True, eq=False)  # not a tuple, for whose contents torch.compile would recompile
class Lowered:
    """A mask prepared for one backend: built once per forward and shared by all layers that use the mask.

    mask          the AttentionMask on the CPU: local queries, and the keys that `exchange` provides
    backend       backend that computes the attention
    reason        why this backend was chosen, for the log
    requirements  what the backend was asked to support
    inputs        kernel inputs, built by `backend.lower`
    exchange      provides the keys and values that the mask indexes
    visible       bool [B, Q] on the device: false for fully masked queries (padding); None if there are none for sure
    segments      int64 [B, S] on the device: document numbers of the full rows, for recurrent layers (see
                  `sightline.masks.segments`); None if not requested
    """

    mask: AttentionMask
    backend: Backend
    reason: str
    requirements: KernelRequirements
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
    value_dim: int | None = None,
    softcap: bool = False,
    exchange: Exchange | None = None,
    segments: bool = False,
) -> Lowered:
    """Choose a backend for a mask and build its kernel inputs.

    backend   one of CHOICES
    exchange  provides the keys under context parallelism; default: all keys are local
    segments  whether to number the documents for recurrent layers

    The other options are those of `KernelRequirements`. A mask on a GPU costs one synchronization, one on the CPU none.

    Raises:
        ValueError: if the mask is invalid, or if the backend is unknown or does not support the mask; the message lists
            the backends that do.
    """
    requirements = KernelRequirements(
        device=torch.device(device),
        dtype=dtype,
        training=training,
        sinks=sinks,
        head_dim=head_dim,
        value_dim=value_dim,
        softcap=softcap,
    )
    check_mask_type(mask, (AttentionMask,))
    mask = mask.cpu()
    mask.validate()
    exchange = exchange or LocalExchange(mask)
    chosen, inputs, reason = _choose(mask, requirements, backend)
    document_numbers = number_segments(exchange.full_mask).to(device, non_blocking=True) if segments else None
    visible = mask.visible_queries().to(device, non_blocking=True)
    return Lowered(mask, chosen, reason, requirements, inputs, exchange, visible, document_numbers)


def check_backend(backend: str, requirements: KernelRequirements) -> str:
    """Return the first backend, by name, that supports the requirements of attention layers, before a mask is known.

    Raises:
        ValueError: if none does; the message lists the backends that do.
    """
    candidates = find_backends(backend, requirements.device)
    unsupported = [candidate.supports(requirements) for candidate in candidates]
    if all(unsupported):
        reasons = "; ".join(map(str, unsupported))
        raise ValueError(
            f"attention backend (--attention.backend) {backend!r}: {reasons}; {_alternatives(requirements)}"
        )
    return candidates[unsupported.index(None)].name


def find_backends(backend: str, device: torch.device) -> list[Backend]:
    """Return the backends that a choice selects on a device, in order of preference. On a CPU `sdpa` selects as `auto`.

    Raises:
        ValueError: if the choice is unknown.
    """
    if backend not in CHOICES:
        raise ValueError(f"unknown attention backend {backend!r}; expected one of: {', '.join(CHOICES)}")
    names = AUTO.get(device.type, ("sdpa",)) if backend == "auto" else (backend,)
    if backend == "sdpa" and device.type == "cpu":
        names = AUTO["cpu"]
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
    softcap: float | None = None,
) -> Tensor:
    """Compute softmax(scale * q k') v over the keys that each query attends to: [B, H, Q, Dv].

    q        [B, H, Q, D]
    k        [B, G, T, D], with H a multiple of G: query head h uses key/value head h // (H / G)
    v        [B, G, T, Dv]
    mask     AttentionMask of (B, Q, T), or the result of `lower` to share the kernel inputs between layers
    backend  one of CHOICES; ignored if `mask` is already lowered
    scale    default 1 / sqrt(D)
    sinks    [H], learned logits that are part of the softmax but have no value (gpt-oss)
    softcap  if given, scores become softcap * tanh(scores / softcap) before the mask and the softmax (Gemma 2); sinks
             are not capped

    A fully masked query has an output of exact zeros and zero gradients. Under autocast, queries, keys and values other
    than float64 are converted to its dtype, as by `F.scaled_dot_product_attention`.

    Raises:
        ValueError: if an argument is invalid, or the backend does not support the arguments or the mask.
    """
    check_mask_type(mask, (AttentionMask, Lowered))
    check_numbers(scale, softcap)
    check_tensors(q, k, v, sinks)
    q, k, v = (_to_kernel(x) for x in (q, k, v))
    check_dtypes(q, k, v)
    check_shapes(q, k, v, mask.mask if isinstance(mask, Lowered) else mask, sinks)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if scale <= 0:  # fused kernels mask scores before they scale them
        q, scale = q * scale, 1.0
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks))
    if isinstance(mask, Lowered):
        _check_lowered(mask, q, training, sinks, softcap)
    elif q.numel() == 0 or k.numel() == 0:  # nothing to compute; fused kernels do not support sizes of 0
        visible = torch.zeros(q.shape[0], 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        return Reference().attend(q, k, v, visible, scale, sinks, softcap)
    else:
        mask = lower(
            mask,
            backend=backend,
            device=q.device,
            dtype=q.dtype,
            training=training,
            sinks=sinks is not None,
            head_dim=q.shape[-1],
            value_dim=v.shape[-1],
            softcap=softcap is not None,
        )
    return mask.backend.attend(q, k, v, mask.inputs, scale, sinks, softcap)


def _to_kernel(x: Tensor) -> Tensor:
    """Convert a tensor to the dtype of autocast, if it is on, with a contiguous last dimension, as kernels need it."""
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    return x.contiguous() if x.dim() and x.stride(-1) != 1 else x


def _check_lowered(lowered: Lowered, q: Tensor, training: bool, sinks: Tensor | None, softcap: float | None) -> None:
    """Check that a lowered mask was made for these inputs.

    Raises:
        ValueError: if it was made for another device or dtype or for inference, or its backend does not support the
            inputs.
    """
    needs = lowered.requirements
    if q.dtype != needs.dtype or q.device.type != needs.device.type:
        raise ValueError(
            f"the mask was lowered for {needs.dtype} on {needs.device}, but q is {q.dtype} on {q.device}; lower it "
            "with the dtype and device of the queries"
        )
    if training and not needs.training:
        raise ValueError(
            "the mask was lowered with training=False, but the inputs require gradients; lower it with training=True, "
            "or use torch.no_grad()"
        )
    if (sinks is not None) <= needs.sinks and (softcap is not None) <= needs.softcap:
        return
    reason = lowered.backend.supports(replace(needs, sinks=sinks is not None, softcap=softcap is not None))
    if reason is not None:
        raise ValueError(
            f"the mask was lowered with sinks={needs.sinks}, softcap={needs.softcap} for backend "
            f"{lowered.backend.name!r}, but {reason}; pass sinks and softcap to `lower`"
        )
