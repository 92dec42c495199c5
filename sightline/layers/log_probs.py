"""Log-probabilities of labels, computed from hidden states without materializing the logits of all tokens."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sightline.layers.loss import CHUNK_SIZE, Transform, add_weight_gradient, product, transformed
from sightline.precision import autocast_dtype, no_autocast


class LogProbs(NamedTuple):
    """Results of `linear_log_probs`, each [N]; numbers are float32, or float64 for float64 inputs."""

    log_probs: Tensor
    entropy: Tensor
    is_top1: Tensor
    """Whether the label is the most likely token."""


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_size: int = CHUNK_SIZE,
    *,
    bias: Tensor | None = None,
    transform: Transform | None = None,
) -> LogProbs:
    """Return log softmax(hidden @ weight.T + bias)[label] of each token, and the entropy of each softmax.

    hidden      [N, W]
    weight      [V, W]
    labels      int64 [N], 0 to V - 1, on the device of `hidden`
    chunk_size  tokens whose logits exist at a time, in float32 even if hidden is bfloat16
    bias        [V], added to the logits
    transform   applied to the logits, such as a soft cap or a temperature

    Log-probabilities and entropy have gradients. The backward computes the logits again, in four matrix products
    altogether: the gradient of the weight depends on the factor of each token, which the forward does not know. Tokens
    whose factors are 0 are skipped on a CPU. `linear_cross_entropy` takes three products for a sum of all tokens.
    """
    dtype = autocast_dtype(hidden)
    if dtype is not None:
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    with no_autocast(hidden):
        return LogProbs(*_LinearLogProbs.apply(hidden, weight, bias, labels, chunk_size, transform))


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_size: int,
        transform: Transform | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_probs, entropy = hidden.new_empty(2, len(hidden), dtype=dtype)
        is_top1 = torch.empty_like(labels, dtype=torch.bool)
        for start in range(0, len(hidden), chunk_size):
            part = slice(start, start + chunk_size)
            logits = product(hidden[part], weight, dtype, bias)
            logits = logits if transform is None else transform(logits)
            rows = torch.arange(len(logits), device=logits.device)
            top, is_top = logits.max(dim=1)
            is_top1[part] = is_top == labels[part]
            probs = torch.softmax(logits, dim=1)
            log_sum = top - probs.gather(1, is_top[:, None]).squeeze(1).log()
            log_probs[part] = logits[rows, labels[part]] - log_sum
            entropy[part] = log_sum - torch.linalg.vecdot(probs, logits)
        ctx.save_for_backward(hidden, weight, bias, labels, entropy)
        ctx.chunk_size, ctx.transform = chunk_size, transform
        ctx.mark_non_differentiable(is_top1)
        ctx.set_materialize_grads(False)
        return log_probs, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *factors: Tensor | None):  # type: ignore[override]
        hidden, weight, bias, labels, entropy = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dtype = entropy.dtype
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if need_bias else None
        for tokens in _tokens_with_gradient(factors[:2], len(hidden), hidden.device).split(ctx.chunk_size):
            x = hidden[tokens]
            of_log_prob, of_entropy = (None if factor is None else factor[tokens, None] for factor in factors[:2])
            to_grads = functools.partial(_to_grads, of_log_prob, of_entropy, entropy[tokens, None])
            logits = product(x, weight, dtype, bias)
            (to_grads if ctx.transform is None else transformed(ctx.transform, to_grads))(logits, labels[tokens])
            if grad_bias is not None:
                grad_bias += logits.sum(dim=0)
            logits = logits.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[tokens] = product(logits, weight.t(), dtype).to(hidden.dtype)
            if grad_weight is not None:
                add_weight_gradient(grad_weight, logits, x)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(bias.dtype), None, None, None


def _tokens_with_gradient(factors: tuple[Tensor | None, ...], length: int, device: torch.device) -> Tensor:
    """Return the indices of the tokens with a factor that is not 0; of all tokens on a device, to avoid a wait."""
    if device.type != "cpu":
        return torch.arange(length, device=device)
    nonzero = torch.zeros(length, dtype=torch.bool)
    for factor in factors:
        if factor is not None:
            nonzero |= factor != 0
    return nonzero.nonzero().squeeze(1)


def _to_grads(
    of_log_prob: Tensor | None, of_entropy: Tensor | None, entropy: Tensor, logits: Tensor, labels: Tensor
) -> Tensor:
    """Overwrite logits [C, V] with their gradient, for the gradients [C, 1] of log-probabilities and entropies."""
    rows = torch.arange(len(labels), device=labels.device)
    if of_entropy is None:
        torch.softmax(logits, dim=1, out=logits)
        logits *= torch.zeros_like(entropy) if of_log_prob is None else -of_log_prob
    else:
        log_probs = torch.log_softmax(logits, dim=1)
        torch.exp(log_probs, out=logits)
        logits *= (log_probs + entropy) * -of_entropy - (0 if of_log_prob is None else of_log_prob)
    if of_log_prob is not None:
        logits[rows, labels] += of_log_prob.squeeze(1)
    return logits
