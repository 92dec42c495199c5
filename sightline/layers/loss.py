"""Fused output projection and cross-entropy, which never materializes the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sightline.batch import IGNORE
from sightline.layers.linear import linear, weight_gradient
from sightline.precision import autocast_dtype, no_autocast

CHUNK_SIZE = 512
"""Tokens whose logits exist at a time. 512 x 8192 floats fit in a CPU's cache, and the matrix products are still large
enough to run at full speed."""

Transform = Callable[[Tensor], Tensor]
"""Elementwise function of the logits that changes nothing in place, such as a soft cap."""
LossesToGrads = Callable[[Tensor, Tensor], Tensor]


def losses_to_grads(logits: Tensor, label: Tensor) -> Tensor:
    """Return the loss of each token [C] and overwrite `logits` [C, V] with their gradient, softmax - onehot.

    -log softmax[label] = max - logit[label] - log softmax[argmax]. softmax[argmax] is at least 1/V, so its log is
    exact, while softmax[label] may underflow to 0. torch.softmax reads each row once, while it is in the cache.
    """
    rows = torch.arange(len(label), device=label.device)
    losses = logits.amax(dim=1) - logits[rows, label]
    torch.softmax(logits, dim=1, out=logits)
    losses -= logits.amax(dim=1).log()
    logits[rows, label] -= 1
    return losses


def transformed(transform: Transform, losses_to_grads: LossesToGrads = losses_to_grads) -> LossesToGrads:
    """Return `losses_to_grads` for logits that are transform(product): it overwrites the product with its gradient."""

    def compute(product: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = product.detach().requires_grad_()
            logits = transform(leaf)
        grad = logits.detach().clone()  # since autograd may need the logits
        losses = losses_to_grads(grad, labels)
        product.copy_(torch.autograd.grad(logits, leaf, grad)[0])
        return losses

    return compute


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_size: int = CHUNK_SIZE,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: Literal["sum", "none"] = "sum",
    vocab_size: int | None = None,
    losses_to_grads: LossesToGrads = losses_to_grads,
) -> Tensor:
    """Sum over tokens of -log softmax(hidden @ weight.T + bias)[label], as float32 scalar (float64 for float64 inputs).

    hidden         [N, W]
    weight         [V, W]
    labels         int64 [N]; tokens labeled -100 have no loss and zero gradient. They are skipped if the labels are on
                   the CPU, and masked if the labels are on a device, to avoid a synchronization
    chunk_size     tokens whose logits exist at a time, in float32 even if hidden is bfloat16
    bias           [V], added to the logits
    token_weights  float [N], factor of each token's loss; no gradient flows into it
    reduction      "none" returns the loss of each token [N], 0 for a token without a label, and computes no gradients

    If the vocabulary is sharded across n ranks, `weight` [V / n, W] is the local shard, vocab_size is V, and
    losses_to_grads replaces the function of that name with one that combines the shards. The gradient of `hidden` is
    then the partial sum over the local shard.

    The forward also computes the gradients, chunk by chunk, and the backward only scales them. This takes three matrix
    products; recomputing the logits in the backward would take four. Under `no_grad` only the loss is computed.

    Raises:
        ValueError: if a label on the CPU is outside the vocabulary. On a device, the loss of such a label is nan.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or labels.dim() != 1:
        shapes = [tuple(t.shape) for t in (hidden, weight, labels)]
        raise ValueError(f"expected hidden [N, W], weight [V, W] and labels [N], got {shapes}; flatten rows first")
    select = select_tokens if labels.device.type == "cpu" else mask_tokens
    selected = select(labels, token_weights, hidden.device, vocab_size or len(weight))
    dtype = autocast_dtype(hidden)
    if dtype is not None:
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    with no_autocast(hidden):  # autocast would round the logits to half precision
        if reduction == "none":
            return _token_losses(hidden, weight, bias, selected, chunk_size, losses_to_grads)
        with_grads = torch.is_grad_enabled()
        return _LinearCrossEntropy.apply(hidden, weight, bias, selected, chunk_size, with_grads, losses_to_grads)


def add_gradient_of(loss: Tensor, auxiliary: Tensor) -> Tensor:
    """Return the value of `loss` with the gradients of both, so that reported losses exclude auxiliary losses."""
    return loss + (auxiliary - auxiliary.detach())


class SelectedTokens(NamedTuple):
    """Indices of the tokens to compute, with their labels and weights, on the device that computes them."""

    tokens: Tensor
    labels: Tensor
    weights: Tensor | None

    def split(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        weights = repeat(None) if self.weights is None else self.weights.split(size)
        return zip(self.tokens.split(size), self.labels.split(size), weights, strict=False)


def select_tokens(labels: Tensor, weights: Tensor | None, device: torch.device, vocab_size: int) -> SelectedTokens:
    """Select the tokens that have a label. The labels are on the CPU, so this does not wait for the device.

    Raises:
        ValueError: if a label is outside the vocabulary.
    """
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
    """Select all tokens, with weight 0 for tokens without a label and nan for labels outside the vocabulary.

    This reads no values from the device.
    """
    labels = labels.to(device, non_blocking=True)
    ones = labels.new_ones(labels.shape, dtype=torch.float32)
    weights = ones if weights is None else weights.to(device, non_blocking=True)
    weights = weights.masked_fill((labels < 0) | (labels >= vocab_size), float("nan")).masked_fill(labels == IGNORE, 0)
    return SelectedTokens(torch.arange(len(labels), device=device), labels.clamp(0, vocab_size - 1), weights)


@torch.no_grad()
def _token_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    selected: SelectedTokens,
    chunk_size: int,
    losses_to_grads: LossesToGrads,
) -> Tensor:
    losses = hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for tokens, labels, weights in selected.split(chunk_size):
        logits = product(hidden[tokens], weight, losses.dtype, bias)
        loss = losses_to_grads(logits, labels)
        losses[tokens] = loss if weights is None else loss * weights
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        selected: SelectedTokens,
        chunk_size: int,
        with_grads: bool,
        losses_to_grads: LossesToGrads,
    ) -> Tensor:
        need_hidden, need_weight, need_bias = (with_grads and need for need in ctx.needs_input_grad[:3])
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss = hidden.new_zeros((), dtype=dtype)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if bias is not None and need_bias else None
        for tokens, labels, weights in selected.split(chunk_size):
            x = hidden[tokens]
            logits = product(x, weight, dtype, bias)
            losses = losses_to_grads(logits, labels)
            if weights is not None:
                losses *= weights
                logits *= weights[:, None]
            if grad_bias is not None:
                grad_bias += logits.sum(dim=0)
            loss += losses.sum()
            grad_logits = logits.to(hidden.dtype)
            del logits  # before the next chunk needs as much memory
            if grad_hidden is not None:
                grad_hidden[tokens] = product(grad_logits, weight.t(), dtype).to(hidden.dtype)
            if grad_weight is not None:
                add_weight_gradient(grad_weight, grad_logits, x)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor):  # type: ignore[override]
        grads = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(grad if grad is None else (grad * scale).to(dtype) for grad, dtype in grads), None, None, None, None


def product(x: Tensor, weight: Tensor, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """Return x weight' + bias, accumulated in `dtype` even if x and weight have less precision."""
    if x.dtype == dtype:
        return linear(x, weight, bias)
    # CUDA tensor cores accumulate bfloat16 in float32; CPUs multiply float32 several times faster than bfloat16.
    product = torch.mm(x, weight.t(), out_dtype=dtype) if x.is_cuda else linear(x.to(dtype), weight.to(dtype))
    return product if bias is None else product.add_(bias)


def add_weight_gradient(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """Compute total += grad' x, accumulated in the dtype of `total`."""
    if not x.is_cuda:
        total.add_(weight_gradient(grad.to(total.dtype), x.to(total.dtype)))
    elif x.dtype == total.dtype:
        total.addmm_(grad.t(), x)  # without a copy of the size of the weight
    else:
        total.add_(torch.mm(grad.t(), x, out_dtype=total.dtype))
