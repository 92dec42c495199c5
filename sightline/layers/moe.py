"""Mixture of experts (MoE): a router selects K of E feed-forward layers for each token.

The selection for a token depends on that token alone. Experts have no capacity limit and drop no tokens, so no
information leaks between documents. Only the summation order of a matrix product may depend on the number of tokens
that share an expert, which can change the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sightline.layers.base import TensorParallelLayer, flops_per_token
from sightline.layers.grouped import grouped_linear, grouped_linears
from sightline.layers.linear import linear
from sightline.precision import no_autocast


class Routing(NamedTuple):
    """The experts of N tokens.

    weights  [N, K], weight of each selected expert; 0 for tokens that are not routed
    experts  int64 [N, K], the selected experts, all different; E for tokens that are not routed
    counts   int64 [E], tokens routed to each expert
    """

    weights: Tensor
    experts: Tensor
    counts: Tensor


class Router(nn.Module):
    """Selects the `top_k` experts with the highest scores for each token and weights them by their scores.

    score                    softmax over all experts (Qwen 3), or sigmoid of each logit (DeepSeek V3, Llama 4)
    renormalize              scale the selected weights to sum to 1; with softmax, this equals the softmax over the
                             selected logits (gpt-oss)
    scale                    factor of the weights
    bias                     add a learned bias to the logits
    num_groups               divide the experts into this number of groups of equal size (DeepSeek V3)
    num_limited_groups       select only from this number of groups: those with the greatest sum of the two best scores
    expert_bias_update_rate  balance the load without a loss (arXiv 2408.15664): after each step, add this rate to the
                             expert bias of experts below the mean load and subtract it above. The expert bias changes
                             the selection but not the weights; see `finish_step`
    aux_loss_coef            coefficient of the load-balancing loss (arXiv 2101.03961): E * sum over experts of (share
                             of the selections * mean share of the scores), which is 1 if the load is even. The decoder
                             adds its gradient to those of the token losses; the reported loss excludes its value

    Logits and scores are computed in float32, since rounding to bfloat16 could change the selection.
    """

    MATRICES: ClassVar = ("weight",)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        score: Literal["softmax", "sigmoid"] = "softmax",
        renormalize: bool = False,
        scale: float = 1.0,
        bias: bool = False,
        num_groups: int = 1,
        num_limited_groups: int = 1,
        expert_bias_update_rate: float | None = None,
        aux_loss_coef: float = 0.0,
    ) -> None:
        super().__init__()
        self.top_k, self.score, self.renormalize, self.scale = top_k, score, renormalize, scale
        self.num_groups, self.num_limited_groups = num_groups, num_limited_groups
        self.expert_bias_update_rate, self.aux_loss_coef = expert_bias_update_rate, aux_loss_coef
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        # Checkpoints store the expert bias but not the counts, since `finish_step` resets them before any checkpoint.
        self.register_buffer("expert_bias", None if expert_bias_update_rate is None else torch.empty(num_experts))
        self.expert_bias: Tensor | None
        self.counts: Tensor | None = None
        self.aux_loss: Tensor | None = None

    def init_weights(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)
        for bias in (self.bias, self.expert_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Routing:
        """x [N, W] -> Routing. `visible` bool [N] is False for padding, which is neither routed nor counted."""
        scores = self._scores(x)
        biased = scores.detach() if scores.requires_grad else scores
        if self.expert_bias is not None:
            biased = biased + self.expert_bias
        experts = self._mask_groups(biased).topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, experts)
        if self.renormalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)  # all sigmoids may be 0
        if self.scale != 1.0:
            weights = weights * self.scale
        if visible is not None:
            weights = weights.masked_fill(~visible[:, None], 0.0)
            experts = experts.masked_fill(~visible[:, None], len(self.weight))
        counts = torch.zeros(len(self.weight) + 1, dtype=torch.int64, device=x.device)
        counts = counts.scatter_add_(0, experts.flatten(), torch.ones_like(experts).flatten())[:-1]
        if self.training and torch.is_grad_enabled():
            self._record(counts, scores, visible)
        return Routing(weights.to(x.dtype), experts, counts)

    def _scores(self, x: Tensor) -> Tensor:
        """Return the scores [N, E] in float32, or in float64 if x is float64."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with no_autocast(x):
            bias = None if self.bias is None else self.bias.to(dtype)
            logits = linear(x.to(dtype), self.weight.to(dtype), bias)
        return logits.softmax(dim=-1) if self.score == "softmax" else logits.sigmoid()

    def _mask_groups(self, scores: Tensor) -> Tensor:
        """Return the scores [N, E] with -inf in all but the best `num_limited_groups` groups of each token."""
        if self.num_limited_groups == self.num_groups:
            return scores
        grouped = scores.unflatten(1, (self.num_groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(self.num_limited_groups, dim=-1, sorted=False).indices
        excluded = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
        return grouped.masked_fill(excluded[..., None], -torch.inf).flatten(1)

    def _record(self, counts: Tensor, scores: Tensor, visible: Tensor | None) -> None:
        """Add the counts to those of the training step, and compute the auxiliary loss."""
        self.counts = counts if self.counts is None else self.counts + counts
        if self.aux_loss_coef:
            fractions = scores / scores.sum(dim=-1, keepdim=True)
            if visible is not None:
                fractions = fractions * visible[:, None]
            counts = self.full_row_counts(counts)
            load = counts.to(fractions.dtype) / counts.sum().clamp(min=1)
            # A sum over the tokens instead of a mean, since it is added to the sum of the token losses.
            self.aux_loss = self.aux_loss_coef * len(counts) * (load @ fractions.sum(dim=0))

    def full_row_counts(self, counts: Tensor) -> Tensor:
        """Return the counts of full rows. Context parallelism replaces this method by a sum over its ranks."""
        return counts

    @torch.no_grad()
    def finish_step(self) -> Tensor | None:
        """Update the expert bias from the counts of all forwards since the last step, and reset the counts.

        Returns the load of the busiest expert as a multiple of the mean load (1 is even), or None if nothing was
        counted. `Decoder.finish_step` has summed the counts over the ranks that hold other tokens.
        """
        counts, self.counts = self.counts, None
        if counts is None:
            return None
        load = counts.float()
        if self.expert_bias is not None and self.expert_bias_update_rate is not None:
            self.expert_bias += self.expert_bias_update_rate * (load.mean() - load).sign()
        return load.max() / load.mean().clamp(min=1e-9)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (arXiv 2002.05202)."""
    return F.silu(gate) * up


class Experts(nn.Module):
    """E feed-forward layers with stacked weights: down(activation(gate(x), up(x))), with or without biases.

    gate, up [E, F, W] and down [E, W, F] are stacks of nn.Linear weights; their biases are [E, F] and [E, W].
    """

    MATRICES: ClassVar = ("gate", "up", "down")

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        activation: Callable[[Tensor, Tensor], Tensor] = swiglu,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.up = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.gate_bias = nn.Parameter(torch.empty(num_experts, intermediate_size)) if bias else None
        self.up_bias = nn.Parameter(torch.empty(num_experts, intermediate_size)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, hidden_size)) if bias else None

    def init_weights(self, std: float, output_std: float) -> None:
        for weight in (self.gate, self.up):
            nn.init.normal_(weight, std=std)
        nn.init.normal_(self.down, std=output_std)
        for bias in (self.gate_bias, self.up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [M, W], sorted by expert -> [M, W].

        counts  int64 [E], rows of each expert; rows after those of the last expert give 0
        """
        gate, up = grouped_linears(x, counts, (self.gate, self.gate_bias), (self.up, self.up_bias))
        return grouped_linear(self.activation(gate, up), self.down, counts, self.down_bias)


class MoE(TensorParallelLayer):
    """Weighted sum of the experts of each token, plus an optional expert that all tokens share.

    score_before_experts  multiply the input of an expert by its weight instead of the output (Llama 4)
    """

    SHARD_DIMS: ClassVar = {
        **{"experts.gate": 1, "experts.up": 1, "experts.gate_bias": 1, "experts.up_bias": 1, "experts.down": 2},
        **{"shared.gate": 0, "shared.up": 0, "shared.down": 1},
    }
    PARTIAL_SUMS = ("experts.down_bias",)

    def __init__(
        self, router: Router, experts: nn.Module, shared: nn.Module | None = None, *, score_before_experts: bool = False
    ) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.score_before_experts = score_before_experts

    def init_weights(self, std: float, output_std: float) -> None:
        self.router.init_weights(std)
        for module in (self.experts, self.shared):
            if module is not None:
                module.init_weights(std, output_std)  # type: ignore[operator]

    def tensor_parallel_units(self) -> dict[str, int]:
        experts: Any = self.experts
        shared: Any = self.shared
        units = {"channels of an expert": experts.gate.shape[1]}
        return units if shared is None else {**units, "channels of the shared expert": shared.gate.out_features}

    def flops_per_token(self) -> float:
        """Return the FLOPs of the router, the selected experts and the shared expert."""
        routed = flops_per_token(self.experts) * self.router.top_k / len(self.router.weight)
        shared = 0.0 if self.shared is None else flops_per_token(self.shared)
        return flops_per_token(self.router) + routed + shared

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """x [B, S, W] -> [B, S, W].

        visible  bool [B, S], a mask's `visible_queries()`: padding uses only the shared expert
        """
        tokens = x.flatten(0, 1)
        routing = self.router(tokens, None if visible is None else visible.flatten())
        if len(tokens) == 1 and not torch.is_grad_enabled():
            out = self._one_token(tokens, routing).view_as(x)
            return out if self.shared is None else out + self.shared(x)
        # The N * K (token, expert) pairs sorted by expert; pairs that are not routed come last.
        permutation = routing.experts.flatten().argsort(stable=True)
        rows = permute(tokens, permutation, self.router.top_k)
        weights = routing.weights
        if self.score_before_experts:
            rows, weights = rows * weights.flatten()[permutation, None], torch.ones_like(weights)
        out = unpermute(self.experts(rows, routing.counts), weights, permutation).view_as(x)
        return out if self.shared is None else out + self.shared(x)

    def _one_token(self, token: Tensor, routing: Routing) -> Tensor:
        """Return the weighted sum of the experts of one token [1, W], which needs no permutation of tokens."""
        order = routing.experts[0].argsort()
        rows, weights = token.expand(len(order), -1), routing.weights[:, order]
        if self.score_before_experts:
            rows, weights = rows * weights.T, torch.ones_like(weights)
        return weights.to(rows.dtype) @ self.experts(rows, routing.counts)


# Autograd's backward of indexing adds rows in no fixed order on a GPU. Here forward and backward are gathers, and the
# sum over K has a fixed order: embedding_bag computes it without materializing its terms.


def permute(tokens: Tensor, permutation: Tensor, top_k: int) -> Tensor:
    """Return one row per (token, expert) pair, [N * K, W], in the order of `permutation`.

    tokens       [N, W]
    permutation  int64 [N * K]; pair i belongs to token i // top_k
    """
    if not torch.is_grad_enabled():
        return tokens.index_select(0, permutation // top_k)
    return _Permute.apply(tokens, permutation, top_k)


def unpermute(rows: Tensor, weights: Tensor, permutation: Tensor) -> Tensor:
    """Inverse of `permute`: return the sum [N, W] of each token's K rows, weighted by `weights` [N, K]."""
    weights = weights.to(rows.dtype)
    if not torch.is_grad_enabled():
        return _weighted_sums(rows, weights, permutation)
    return _Unpermute.apply(rows, weights, permutation)


def _weighted_sums(rows: Tensor, weights: Tensor, permutation: Tensor) -> Tensor:
    index = _inverse_permutation(permutation, weights.shape[1])
    return F.embedding_bag(index, rows, mode="sum", per_sample_weights=weights)


def _inverse_permutation(permutation: Tensor, top_k: int) -> Tensor:
    """Return the inverse permutation [N, K]: the rows of each token's K pairs."""
    index = torch.arange(len(permutation), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, index).view(-1, top_k)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, permutation: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(permutation)
        ctx.top_k = top_k
        return tokens.index_select(0, permutation // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        (permutation,) = ctx.saved_tensors
        return F.embedding_bag(_inverse_permutation(permutation, ctx.top_k), grad, mode="sum"), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, permutation: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, permutation)
        return _weighted_sums(rows, weights, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        rows, weights, permutation = ctx.saved_tensors
        grad_rows = grad.index_select(0, permutation // weights.shape[1])
        grad_weights = torch.empty_like(weights).flatten()
        grad_weights[permutation] = torch.einsum("mw,mw->m", rows, grad_rows)  # vecdot would materialize the products
        grad_rows *= weights.flatten()[permutation, None]
        return grad_rows, grad_weights.view_as(weights), None


def routers_of(model: nn.Module) -> dict[str, Router]:
    """Return all routers of a model, by the name of the MoE layer that contains them."""
    named = ((name, module) for name, module in model.named_modules() if isinstance(module, Router))
    return {name.removesuffix(".router"): router for name, router in named}
