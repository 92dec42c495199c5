"""The output projection and the cross-entropy in one, so that the logits of all tokens never exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sightline.batch import IGNORE
from sightline.layers.precision import autocast_dtype, no_autocast

CHUNK_SIZE = 512
"""Tokens whose logits exist at a time. 512 x 8192 floats stay in a CPU's cache while the matrix products are still
large enough to run at full rate."""


def losses_to_grads(logits: Tensor, label: Tensor) -> Tensor:
    """The loss of each token [C]; `logits` [C, V] become their gradient, softmax - onehot, in place.

    -log softmax[label] = max - logit[label] - log softmax[argmax]: the last is at least 1/V, so its log is exact where
    that of a tiny softmax[label] would be -inf. torch.softmax works row by row in the cache, exp and sum in one go.
    """
    rows = torch.arange(len(label), device=label.device)
    losses = logits.amax(dim=1) - logits[rows, label]
    torch.softmax(logits, dim=1, out=logits)
    losses -= logits.amax(dim=1).log()
    logits[rows, label] -= 1
    return losses


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_size: int = CHUNK_SIZE,
    *,
    token_weights: Tensor | None = None,
    reduction: Literal["sum", "none"] = "sum",
    vocab_size: int | None = None,
    losses_to_grads: Callable[[Tensor, Tensor], Tensor] = losses_to_grads,
) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T)[label], as a float32 scalar (float64 for float64 inputs).

    hidden         [N, W]
    weight         [V, W]
    labels         int64 [N]; tokens with -100 have no loss and zero gradient. They are not computed where the labels
                   lie on the CPU, and masked where they lie on a device, whose values are never read here
    chunk_size     tokens whose logits exist at a time, in float32 also where hidden is bfloat16
    token_weights  float [N], factor of each token's loss; no gradient flows into it
    reduction      "none" returns the loss of each token [N], 0 without a label, and computes no gradients

    Where `weight` [V / n, W] is one process's part of the vocabulary, vocab_size is all of V and losses_to_grads stands
    for the function of that name, one that knows of the other parts. The gradient of `hidden` is then what this part
    adds to it.

    The forward computes the gradients too, chunk by chunk, and the backward only scales them: three matrix products
    and not the four of recomputing the logits. Under `no_grad` it computes the loss alone.

    Raises:
        ValueError: for a label outside the vocabulary. Labels on a device are not read: there its loss is nan.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or labels.dim() != 1:
        shapes = [tuple(t.shape) for t in (hidden, weight, labels)]
        raise ValueError(f"expected hidden [N, W], weight [V, W] and labels [N], got {shapes}; flatten rows first")
    select = select_tokens if labels.device.type == "cpu" else mask_tokens
    chosen = select(labels, token_weights, hidden.device, vocab_size or len(weight))
    dtype = autocast_dtype(hidden)
    if dtype is not None:
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with no_autocast(hidden):  # it would round the logits to its own precision
        if reduction == "none":
            return _each_loss(hidden.detach(), weight.detach(), chosen, chunk_size, losses_to_grads)
        with_grads = torch.is_grad_enabled()
        return _LinearCrossEntropy.apply(hidden, weight, chosen, chunk_size, with_grads, losses_to_grads)


def with_gradient_of(loss: Tensor, auxiliary: Tensor) -> Tensor:
    """The value of `loss` and the gradients of both, so that a loss stays comparable whatever else is asked for."""
    return loss + (auxiliary - auxiliary.detach())


class SelectedTokens(NamedTuple):
    """The tokens to compute, on the device that computes them: which of the N they are, their labels and weights."""

    tokens: Tensor
    labels: Tensor
    weights: Tensor | None

    def split(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        weights = repeat(None) if self.weights is None else self.weights.split(size)
        return zip(self.tokens.split(size), self.labels.split(size), weights, strict=False)


def select_tokens(labels: Tensor, weights: Tensor | None, device: torch.device, vocab_size: int) -> SelectedTokens:
    """The tokens that have a label, from labels on the CPU: the device is not waited for."""
    tokens = (labels != IGNORE).nonzero().squeeze(1)
    labels = labels[tokens]
    if len(tokens):
        low, high = torch.stack(labels.aminmax()).tolist()
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"label {high if high >= vocab_size else low} is outside the vocabulary of {vocab_size} tokens; "
                f"a label is 0 to {vocab_size - 1}, or {IGNORE} for no loss: give the model the tokenizer's vocabulary"
            )
    tokens, labels = tokens.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    return SelectedTokens(tokens, labels, None if weights is None else weights.to(device, non_blocking=True)[tokens])


def mask_tokens(labels: Tensor, weights: Tensor | None, device: torch.device, vocab_size: int) -> SelectedTokens:
    """All tokens, those without a label at a weight of 0 and those with an impossible one at nan: nothing is read."""
    labels = labels.to(device, non_blocking=True)
    ones = labels.new_ones(labels.shape, dtype=torch.float32)
    weights = ones if weights is None else weights.to(device, non_blocking=True)
    weights = weights.masked_fill((labels < 0) | (labels >= vocab_size), float("nan")).masked_fill(labels == IGNORE, 0)
    return SelectedTokens(torch.arange(len(labels), device=device), labels.clamp(0, vocab_size - 1), weights)


def _each_loss(
    hidden: Tensor,
    weight: Tensor,
    chosen: SelectedTokens,
    chunk_size: int,
    losses_to_grads: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    losses = hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for tokens, labels, weights in chosen.split(chunk_size):
        logits = losses.new_empty(len(tokens), len(weight))
        _matmul_into(logits, hidden[tokens], weight.t())
        loss = losses_to_grads(logits, labels)
        losses[tokens] = loss if weights is None else loss * weights
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        chosen: SelectedTokens,
        chunk_size: int,
        with_grads: bool,
        losses_to_grads: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        need_hidden, need_weight = (with_grads and need for need in ctx.needs_input_grad[:2])
        wide = torch.promote_types(hidden.dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=wide)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        buffer = hidden.new_empty(min(chunk_size, len(chosen.tokens)), len(weight), dtype=wide)
        for tokens, labels, weights in chosen.split(chunk_size):
            x, logits = hidden[tokens], buffer[: len(tokens)]
            _matmul_into(logits, x, weight.t())
            losses = losses_to_grads(logits, labels)
            if weights is not None:
                losses *= weights
                logits *= weights[:, None]
            loss += losses.sum()
            grad_logits = logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad = torch.empty_like(x, dtype=wide)
                _matmul_into(grad, grad_logits, weight)
                grad_hidden[tokens] = grad.to(hidden.dtype)
            if grad_weight is not None:
                _matmul_into(grad_weight, grad_logits.t(), x, add=True)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _matmul_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, summed and kept in out's precision where a and b have less."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=int(add))
        return
    # On CUDA bfloat16 tensor cores give a float32 result; a CPU multiplies float32 several times faster than bfloat16.
    product = torch.mm(a, b, out_dtype=out.dtype) if a.is_cuda else a.to(out.dtype) @ b.to(out.dtype)
    out.add_(product) if add else out.copy_(product)
