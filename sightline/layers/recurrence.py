"""Recurrent layers: a causal convolution and the gated delta rule, both reset at each document.

Document starts come from the attention mask, so recurrent and attention layers always agree. Documents in a row do not
affect each other by a single bit: contributions across documents are multiplied by exactly 0, and no cumulative sum
spans two documents.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.attention import Lowered
from sightline.layers.base import RecurrentLayer
from sightline.layers.cache import RecurrentCache
from sightline.layers.linear import Linear
from sightline.layers.norm import RMSNorm
from sightline.masks import AttentionMask
from sightline.precision import no_autocast


def causal_convolution(x: Tensor, weight: Tensor, segments: Tensor, past: Tensor | None = None) -> Tensor:
    """Depthwise convolution: y[t] = sum over d < K of weight[:, K - 1 - d] * x[t - d], within the document of t.

    x         [B, S, C]
    weight    [C, K]; the last column multiplies the current token
    segments  int [B, S], from `sightline.masks.segments`
    past      [B, K - 1, C], the tokens before x, which belong to segment 0; None stands for 0
    """
    length, history = x.shape[1], weight.shape[1] - 1
    y = x * weight[:, history]
    if length == 1 and past is not None:
        return y + (past * weight[:, :history].T).sum(dim=1, keepdim=True) * (segments == 0)[..., None]
    x = F.pad(x, (0, 0, history, 0)) if past is None else torch.cat([past, x], dim=1)
    padded = F.pad(segments, (history, 0))
    for lag in range(1, history + 1):
        shifted = slice(history - lag, history - lag + length)
        y = y + x[:, shifted] * weight[:, history - lag] * (padded[:, shifted] == segments)[..., None]
    return y


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    segments: Tensor,
    state: Tensor | None = None,
    *,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Update one state M [D, E] per head with each token, starting from 0 in each document (arXiv 2412.06464).

        M = exp(decay) M                decay
        M = M + beta k (v - M' k)'      move the value stored for k towards v; beta = 1 replaces it
        o = M' q                        output

    q, k      [B, S, G, D], where G divides H: value head h uses key head h // (H / G)
    v         [B, S, H, E]
    decay     [B, S, H], at most 0: log of the decay factor of the state
    beta      [B, S, H], 0 to 1
    segments  int [B, S], from `sightline.masks.segments`
    state     [B, H, D, E], the initial state of segment 0; None stands for 0

    Returns o [B, S, H, E] and the state after the last token. Inputs in half precision are computed in float32.

    The tokens of a chunk of C tokens are computed in parallel (the paper's WY form); the state passes from chunk to
    chunk. Inside a chunk, P[i, j] is the decay from token j to token i, and a_i is the decay from the start of the
    chunk to token i. With M the state at the start of the chunk and M_i the decayed state before the update of token i,
    the updates u_i = beta_i (v_i - M_i' k_i) solve a triangular system:

        u_i + beta_i sum over j < i of P[i, j] (k_i' k_j) u_j  =  beta_i v_i - beta_i a_i M' k_i

    P is 0 between documents, and a_i is 0 from the first document start on, so each document has a separate system.
    """
    dtype, length = v.dtype, v.shape[1]
    if length == 1 and state is not None:
        return _one_token(q, k, v, decay, beta, segments, state)
    with no_autocast(v):
        chunk_size = min(chunk_size, length)
        pair_decay, state_decay = _decay_factors(
            _split_chunks(_at_least_float32(decay), chunk_size), _split_chunks(segments, chunk_size)
        )
        q, k, v, beta = (
            _split_chunks(_at_least_float32(t), chunk_size).transpose(2, 3) for t in (q, k, v, beta[..., None])
        )

        repeat = v.shape[2] // k.shape[2]
        kk, qk = k @ k.mT, q @ k.mT  # [N, B, G, C, C], computed once per key head
        q, k, kk, qk = (t.repeat_interleave(repeat, dim=2) if repeat > 1 else t for t in (q, k, kk, qk))
        k_state = k * state_decay
        rhs = torch.cat([v, k_state], dim=-1) * beta
        solved = torch.linalg.solve_triangular(kk * pair_decay * beta, rhs, upper=False, unitriangular=True)
        u_values, u_keys = solved.split([v.shape[-1], k.shape[-1]], dim=-1)  # u = u_values - u_keys M

        if state is None:
            state = v.new_zeros(*v.shape[1:3], k.shape[-1], v.shape[-1])
        states, updates = [], []
        k_end = (k * pair_decay[..., -1, :, None]).mT
        for values, keys, write, keep in zip(u_values, u_keys, k_end, state_decay[..., -1:, :], strict=True):
            states.append(state)
            updates.append(values - keys @ state)
            state = keep * state + write @ updates[-1]

        o = (q * state_decay) @ torch.stack(states) + (qk * pair_decay) @ torch.stack(updates)
    return o.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length].to(dtype), state


def _one_token(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, segments: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `gated_delta_rule` of one token per row, the recurrence itself."""
    dtype, repeat = v.dtype, v.shape[2] // k.shape[2]
    with no_autocast(v):
        q, k, v, decay, beta = (_at_least_float32(t[:, 0]) for t in (q, k, v, decay, beta))
        if repeat > 1:
            q, k = q.repeat_interleave(repeat, dim=1), k.repeat_interleave(repeat, dim=1)
        keep = decay.exp() * (segments == 0)  # [B, H]; 0 where the token starts a document
        state = state * keep[..., None, None]
        update = beta[..., None] * (v - (k[..., None, :] @ state)[..., 0, :])
        state = torch.addcmul(state, k[..., None], update[..., None, :])
        o = q[..., None, :] @ state
    return o.transpose(1, 2).to(dtype), state


def _decay_factors(decay: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the decay between tokens of a chunk [N, B, H, C, C] and from the chunk's start to a token [N, B, H, C, 1].

    The logs (decay [N, B, C, H], segments [N, B, C]) are summed from the start of the document, or of the chunk, by a
    matrix of 0 and 1. A cumulative sum over the row would be cheaper, but its rounding errors would leak from one
    document to the next.
    """
    same = (segments[..., :, None] == segments[..., None, :]).tril()  # [N, B, C, C]
    total = (same.to(decay.dtype) @ decay).mT[..., None]  # [N, B, H, C, 1]
    pair_decay = (total - total.mT).masked_fill(~same[:, :, None], -torch.inf).exp()
    previous = torch.cat([torch.zeros_like(segments[:1, :, 0]), segments[:-1, :, -1]])
    continues = segments == previous[..., None]
    return pair_decay, total.exp() * continues[:, :, None, :, None]


def _split_chunks(t: Tensor, size: int) -> Tensor:
    """Split [B, S, ...] into N chunks of C tokens: [N, B, C, ...].

    The last chunk is padded with 0: a key of 0 writes nothing, a decay of 0 keeps the state. `segments` is padded with
    its last value, so that the state after the last chunk is the state after the last token.
    """
    batch, length = t.shape[:2]
    missing = -length % size
    if missing:
        padding = t[:, -1:].expand(-1, missing) if t.dim() == 2 else t.new_zeros(batch, missing, *t.shape[2:])
        t = torch.cat([t, padding], dim=1)
    return t.unflatten(1, (-1, size)).transpose(0, 1)


def _at_least_float32(t: Tensor) -> Tensor:
    """Convert half precision to float32; keep float32 and float64."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class CausalConvolution(nn.Module):
    """Depthwise convolution with a learned kernel of K tokens, followed by SiLU."""

    MATRICES: ClassVar = ()

    def __init__(self, channels: int, conv_kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, conv_kernel))

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, x: Tensor, mask: Lowered, segments: Tensor, cache: RecurrentCache | None = None) -> Tensor:
        """x [B, S, C] -> [B, S, C], with the local channels if `exchange.to_full_rows` has sharded x by channels."""
        past = None if cache is None else cache.append_inputs(x, self.weight.shape[1] - 1)
        return F.silu(causal_convolution(x, mask.exchange.local_channels(self.weight), segments, past))


class GatedDeltaNet(RecurrentLayer):
    """Gated DeltaNet layer (arXiv 2412.06464) as in Qwen3-Next.

    Queries, keys and values pass through a short convolution, then queries and keys are L2-normalized. The decay
    factor, exp(-exp(A_log) softplus(decay(x) + dt_bias)), is computed per token and value head; A_log and dt_bias
    follow Mamba (arXiv 2312.00752). The output is RMS-normalized per head and gated.
    """

    MATRICES: ClassVar = ()  # A_log and dt_bias are the only parameters outside the submodules
    SHARD_DIMS: ClassVar = {
        **{"qkv": 0, "convolution": 0, "beta": 0, "decay": 0, "A_log": 0, "dt_bias": 0, "gate": 0},
        "output": 1,
    }

    def __init__(
        self,
        hidden_size: int,
        num_key_heads: int,
        num_value_heads: int,
        key_head_dim: int,
        value_head_dim: int,
        conv_kernel: int,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.key_head_dim, self.value_head_dim = key_head_dim, value_head_dim
        values = num_value_heads * value_head_dim
        # Channels of each key head in `qkv`: its query, its key, and the values of the value heads that share it.
        self.qkv_sizes = [key_head_dim, key_head_dim, values // num_key_heads]
        self.qkv = Linear(hidden_size, num_key_heads * sum(self.qkv_sizes), bias=False)
        self.convolution = CausalConvolution(num_key_heads * sum(self.qkv_sizes), conv_kernel)
        self.beta = Linear(hidden_size, num_value_heads, bias=False)
        self.decay = Linear(hidden_size, num_value_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_value_heads))
        self.norm = RMSNorm(value_head_dim, norm_eps)
        self.gate = Linear(hidden_size, values, bias=False)
        self.output = Linear(values, hidden_size, bias=False)

    def init_weights(self, std: float, output_std: float) -> None:
        """Initialize weights to normal, with std K^-0.5 for the convolution, and norm and dt_bias to 1.

        exp(A_log) is uniform from 0.01 to 16, so some heads remember hundreds of tokens and others only one.
        """
        for linear in (self.qkv, self.beta, self.decay, self.gate):
            nn.init.normal_(linear.weight, std=std)
        self.convolution.init_weights()
        with torch.no_grad():
            self.A_log.uniform_(0.01, 16).log_()  # log(0) would be -inf
        nn.init.ones_(self.dt_bias)
        self.norm.init_weights()
        nn.init.normal_(self.output.weight, std=output_std)

    def new_cache(self) -> RecurrentCache:
        """Return an empty cache for generation."""
        return RecurrentCache()

    def tensor_parallel_units(self) -> dict[str, int]:
        return {"key heads of a recurrent layer": self.context_parallel_heads()}

    def context_parallel_heads(self) -> int:
        """Return the number of key heads; each is sharded together with the value heads that share it."""
        return self.qkv.out_features // sum(self.qkv_sizes)

    def flops_per_token(self) -> float:
        """Return the FLOPs of the matrices plus 18 per element of each value head's state.

        Each token multiplies the state by its key and its query and adds an outer product: three operations of 2
        FLOPs forward and 4 backward. The chunked algorithm computes more.
        """
        return super().flops_per_token() + 18.0 * self.gate.out_features * self.key_head_dim

    def forward(self, x: Tensor, mask: Lowered, encoding: Any = None, cache: RecurrentCache | None = None) -> Tensor:
        """x [B, S, W] -> [B, S, W]. `encoding` is ignored: a recurrence needs no position encoding.

        With a cache, the queries of the mask are these S tokens and its keys are all tokens so far.
        """
        exchange, segments = mask.exchange, mask.segments
        assert segments is not None, "recurrent layers need a mask that was lowered with segments=True"
        _check_full_rows(exchange.full_mask, cache)
        # Context parallelism: from all heads of the local tokens to the local heads of all tokens.
        qkv, decay, beta = exchange.to_full_rows(self.qkv(x), self.decay(x), self.beta(x))
        qkv = self.convolution(qkv, mask, segments, cache).unflatten(-1, (-1, sum(self.qkv_sizes)))
        q, k, v = qkv.split(self.qkv_sizes, dim=-1)
        q, k = _l2_normalize(_at_least_float32(q)), _l2_normalize(_at_least_float32(k))
        v = v.unflatten(-1, (-1, self.value_head_dim)).flatten(2, 3)
        A_log, dt_bias = exchange.local_channels(self.A_log), exchange.local_channels(self.dt_bias)
        decay = -_at_least_float32(A_log).exp() * F.softplus(_at_least_float32(decay) + dt_bias)
        state = None if cache is None else cache.state
        o, state = gated_delta_rule(q * self.key_head_dim**-0.5, k, v, decay, beta.sigmoid(), segments, state)
        if cache is not None:
            cache.state = state
        o = exchange.to_local_tokens(o.flatten(2)).unflatten(-1, (-1, self.value_head_dim))
        gate = F.silu(self.gate(x)).unflatten(-1, (-1, self.value_head_dim))
        return self.output((self.norm(o) * gate).flatten(2))


def _l2_normalize(x: Tensor) -> Tensor:
    """Return x / |x| over the last dim, and 0 for x = 0."""
    return x * (x.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt()


def _check_full_rows(mask: AttentionMask, cache: RecurrentCache | None) -> None:
    _, queries, keys = mask.shape
    if cache is None and queries != keys:
        raise ValueError(
            f"a recurrent layer needs all tokens of a row, got a mask of {queries} queries and {keys} keys; "
            "pass full rows, or the cache with the state after the previous tokens"
        )
