"""Kernels without a second derivative, and without rules for the transforms of torch.func."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sightline.attention.torch_private import is_transformed

Gradients = tuple[Tensor | None, ...]
Backward = Callable[..., Gradients]


def check_no_transforms(backend: str, *tensors: Tensor | None) -> None:
    """Check that no tensor is inside a transform of torch.func.

    Raises:
        ValueError: if one is.
    """
    if any(x is not None and is_transformed(x) for x in tensors):
        raise ValueError(
            f"attention backend {backend!r} does not support the transforms of torch.func (grad, vmap, jacrev, ...) or "
            "batched gradients; use torch.autograd.grad without is_grads_batched, or backend='reference'"
        )


def first_order(backend: str) -> Callable[[Backward], Backward]:
    """Decorate the backward of an autograd Function whose gradients have no derivative.

    With `create_graph=True` the gradients stay connected to the inputs by a node that raises ValueError if it is
    differentiated. `torch.autograd.function.once_differentiable` connects them to nothing, so that a second derivative
    from `torch.autograd.grad` lacks their part without an error.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def first_order_backward(ctx: Any, *d_outputs: Tensor) -> Gradients:
            check_no_transforms(backend, *d_outputs)
            with torch.no_grad():
                gradients = backward(ctx, *d_outputs)
            if not torch.is_grad_enabled():
                return gradients
            present = [gradient for gradient in gradients if gradient is not None]
            marked = iter(_NoSecondDerivative.apply(backend, len(present), *present, *d_outputs, *ctx.saved_tensors))
            return tuple(None if gradient is None else next(marked) for gradient in gradients)

        return first_order_backward

    return decorate


class _NoSecondDerivative(torch.autograd.Function):
    """Return the first `count` tensors; a derivative with respect to any of the tensors raises ValueError."""

    @staticmethod
    def forward(ctx: Any, backend: str, count: int, *tensors: Tensor | None) -> Gradients:
        ctx.backend = backend
        return tuple(x.view_as(x) for x in tensors[:count] if x is not None)

    @staticmethod
    def backward(ctx: Any, *d_gradients: Tensor) -> Gradients:
        raise ValueError(
            f"attention backend {ctx.backend!r} has no second derivative; use backend='reference' "
            "(--attention.backend reference), which has"
        )
