"""Mixture of experts: a router chooses K of E feed-forward layers for each token.

Each token's choice depends on that token alone: no expert has a capacity, so none drops a token because others came
first, and a document cannot be reached through the experts of another one. What is left is the order in which a matrix
product sums: it may differ in the last bit with the number of tokens that share an expert.
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
from sightline.layers.precision import no_autocast


class Routing(NamedTuple):
    """Where N tokens go.

    weights  [N, K], what each chosen expert counts; 0 for a token that is not routed
    experts  int64 [N, K], the chosen experts, all different; E for a token that is not routed
    counts   int64 [E], tokens that come to each expert
    """

    weights: Tensor
    experts: Tensor
    counts: Tensor


class Router(nn.Module):
    """Chooses `top_k` of `experts` by a score of each, and weighs them by it.

    score         softmax over all experts (Qwen 3), or a sigmoid of each logit by itself (DeepSeek V3, Llama 4)
    renormalize   the chosen weights sum to 1; with softmax that is the softmax over the chosen logits (gpt-oss)
    scale         the weights are multiplied by it
    bias          learned, added to the logits
    groups        the experts stand in so many groups of equal size, of which only the `num_limited_groups` are open to a token
                  whose two best experts have the greatest sum of scores (DeepSeek V3)
    expert_bias_update_rate  balances the load without a loss (arXiv 2408.15664): an expert with less than the mean load of a step
                  gets so much added to the score that chooses it, one with more so much subtracted. Its weight stays
                  as it was. See `finish_step`
    aux_loss_coef coefficient of a loss that balances too (arXiv 2101.03961): E * sum over experts of (its share of the
                  choices * its mean share of the scores), which is 1 where all are equal. The decoder adds its
                  gradient to that of the token losses, whose value stays as it was

    Logits and scores are computed in float32: a choice that bfloat16 rounds goes to another expert.
    """

    MATRICES: ClassVar = ("weight",)

    def __init__(
        self,
        hidden_size: int,
        experts: int,
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
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(experts)) if bias else None
        # Checkpoints keep the balance. The counts of a step live only until its end, where there are no checkpoints.
        self.register_buffer("expert_bias", None if expert_bias_update_rate is None else torch.empty(experts))
        self.expert_bias: Tensor | None
        self.counts: Tensor | None = None
        self.aux_loss: Tensor | None = None

    def init_weights(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)
        for start_at_zero in (self.bias, self.expert_bias):
            if start_at_zero is not None:
                nn.init.zeros_(start_at_zero)

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Routing:
        """x [N, W], visible bool [N]: False for padding, which is not routed and not counted."""
        scores = self._scores(x)
        choice = scores.detach() if self.expert_bias is None else scores.detach() + self.expert_bias
        experts = self._open_groups(choice).topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, experts)
        if self.renormalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)  # sigmoids may all be 0
        weights = weights * self.scale
        if visible is not None:
            weights = weights.masked_fill(~visible[:, None], 0.0)
            experts = experts.masked_fill(~visible[:, None], len(self.weight))
        counts = torch.zeros(len(self.weight) + 1, dtype=torch.int64, device=x.device)
        counts = counts.scatter_add_(0, experts.flatten(), torch.ones_like(experts).flatten())[:-1]
        if self.training and torch.is_grad_enabled():
            self._note(counts, scores, visible)
        return Routing(weights.to(x.dtype), experts, counts)

    def _scores(self, x: Tensor) -> Tensor:
        """[N, E] in float32, or in float64 for such x."""
        wide = torch.promote_types(x.dtype, torch.float32)
        with no_autocast(x):
            bias = None if self.bias is None else self.bias.to(wide)
            logits = F.linear(x.to(wide), self.weight.to(wide), bias)
        return logits.softmax(dim=-1) if self.score == "softmax" else logits.sigmoid()

    def _open_groups(self, choice: Tensor) -> Tensor:
        """The scores [N, E], -inf in the groups that are closed to the token."""
        if self.num_limited_groups == self.num_groups:
            return choice
        grouped = choice.unflatten(1, (self.num_groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(dim=-1).topk(self.num_limited_groups, dim=-1, sorted=False).indices
        closed = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, best, False)
        return grouped.masked_fill(closed[..., None], -torch.inf).flatten(1)

    def _note(self, counts: Tensor, scores: Tensor, visible: Tensor | None) -> None:
        """Keep what a training step wants to know later."""
        self.counts = counts if self.counts is None else self.counts + counts
        if self.aux_loss_coef:
            shares = scores / scores.sum(dim=-1, keepdim=True)
            if visible is not None:
                shares = shares * visible[:, None]
            counts = self.full_row_counts(counts)
            chosen = counts.to(shares.dtype) / counts.sum().clamp(min=1)
            # The mean over the tokens would be a loss of each; their sum joins the sum of the token losses.
            self.aux_loss = self.aux_loss_coef * len(counts) * (chosen @ shares.sum(dim=0))

    def full_row_counts(self, counts: Tensor) -> Tensor:
        """The counts of whole rows: here they are those of this forward. Parts of rows replace this by a sum."""
        return counts

    @torch.no_grad()
    def finish_step(self) -> Tensor | None:
        """Move the balance by the counts of all forwards since the last step, and forget them.

        Returns the load of the busiest expert as a multiple of the mean load (1 is even), or None where nothing was
        counted. Where tokens lie on several processes, `counts` have been summed over them: see Decoder.finish_step.
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
    """E feed-forward layers, their weights stacked: down(activation(gate(x), up(x))), with or without biases.

    gate, up [E, F, W] and down [E, W, F] lie as in nn.Linear, one after another; biases [E, F] and [E, W].
    """

    MATRICES: ClassVar = ("gate", "up", "down")

    def __init__(
        self,
        experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        activation: Callable[[Tensor, Tensor], Tensor] = swiglu,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))
        self.up = nn.Parameter(torch.empty(experts, intermediate_size, hidden_size))
        self.down = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))
        self.gate_bias = nn.Parameter(torch.empty(experts, intermediate_size)) if bias else None
        self.up_bias = nn.Parameter(torch.empty(experts, intermediate_size)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(experts, hidden_size)) if bias else None

    def init_weights(self, std: float, output_std: float) -> None:
        for weight in (self.gate, self.up):
            nn.init.normal_(weight, std=std)
        nn.init.normal_(self.down, std=output_std)
        for bias in (self.gate_bias, self.up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x [M, W], sorted by expert; counts int64 [E], rows of each -> [M, W], 0 for rows behind the last expert's."""
        gate, up = grouped_linears(x, counts, (self.gate, self.gate_bias), (self.up, self.up_bias))
        return grouped_linear(self.activation(gate, up), self.down, counts, self.down_bias)


class MoE(TensorParallelLayer):
    """The weighted sum of each token's experts, and of one expert that all tokens share where there is one.

    score_before_experts  a weight multiplies what comes into its expert and not what comes out (Llama 4)
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
        for part in (self.experts, self.shared):
            if part is not None:
                part.init_weights(std, output_std)  # type: ignore[operator]

    def tensor_parallel_units(self) -> dict[str, int]:
        experts: Any = self.experts
        shared: Any = self.shared
        parts = {"channels of an expert": experts.gate.shape[1]}
        return parts if shared is None else {**parts, "channels of the shared expert": shared.gate.out_features}

    def flops_per_token(self) -> float:
        """Of the experts those that a token is sent to, the router, and the shared expert."""
        sent = flops_per_token(self.experts) * self.router.top_k / len(self.router.weight)
        shared = 0.0 if self.shared is None else flops_per_token(self.shared)
        return flops_per_token(self.router) + sent + shared

    def forward(self, x: Tensor, visible: Tensor | None = None) -> Tensor:
        """x [B, S, W] -> [B, S, W]. visible bool [B, S], a mask's `visible_queries()`: padding has only the shared expert."""
        tokens = x.flatten(0, 1)
        routing = self.router(tokens, None if visible is None else visible.flatten())
        # A slot is one of a token's K choices. Sorted by expert, unrouted ones last, the permutation are the experts' rows.
        permutation = routing.experts.flatten().argsort(stable=True)
        rows = permute(tokens, permutation, self.router.top_k)
        weights = routing.weights
        if self.score_before_experts:
            rows, weights = rows * weights.flatten()[permutation, None], torch.ones_like(weights)
        out = unpermute(self.experts(rows, routing.counts), weights, permutation).view_as(x)
        return out if self.shared is None else out + self.shared(x)


# Autograd's own backward of an index adds row by row into zeros, in no fixed order on a GPU. Here each way is a gather,
# and the way back the sum over K in a fixed order, which embedding_bag takes without writing down what it sums.


def permute(tokens: Tensor, permutation: Tensor, top_k: int) -> Tensor:
    """tokens [N, W], permutation a permutation of N * K: row i of the result [N * K, W] is the token that slot i is of."""
    return _Permute.apply(tokens, permutation, top_k)


def unpermute(rows: Tensor, weights: Tensor, permutation: Tensor) -> Tensor:
    """The way back: the sum of each token's K rows, weighted by weights [N, K], in the order of its permutation: [N, W]."""
    return _Unpermute.apply(rows, weights.to(rows.dtype), permutation)


def _inverse_permutation(permutation: Tensor, top_k: int) -> Tensor:
    """The rows of each token's permutation: the inverse permutation, [N, K]."""
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
        places = _inverse_permutation(permutation, weights.shape[1])
        return F.embedding_bag(places, rows, mode="sum", per_sample_weights=weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        rows, weights, permutation = ctx.saved_tensors
        grad_rows = grad.index_select(0, permutation // weights.shape[1])
        grad_weights = torch.empty_like(weights).flatten()
        grad_weights[permutation] = torch.einsum("mw,mw->m", rows, grad_rows)  # vecdot would write every product down
        grad_rows *= weights.flatten()[permutation, None]
        return grad_rows, grad_weights.view_as(weights), None


def routers_of(model: nn.Module) -> dict[str, Router]:
    """All routers of a model, by the name of the layer they stand in."""
    named = ((name, module) for name, module in model.named_modules() if isinstance(module, Router))
    return {name.removesuffix(".router"): router for name, router in named}
