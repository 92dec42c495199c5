"""Layers with a memory: a causal convolution and the gated delta rule, which forget at every document.

Where documents begin they read from the mask that attention obeys, so one statement of the facts serves both. What one
document computes never meets another's: between them stand factors of exactly 0, and no sum runs over both and is
subtracted again, so not one bit depends on the neighbours.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline.attention import Lowered
from sightline.layers.base import RecurrentLayer
from sightline.layers.cache import RecurrentCache
from sightline.layers.norm import RMSNorm
from sightline.layers.precision import no_autocast
from sightline.masks import AttentionMask


def causal_convolution(x: Tensor, weight: Tensor, segments: Tensor, past: Tensor | None = None) -> Tensor:
    """Depthwise: y[t] = sum over d < K of weight[:, K - 1 - d] * x[t - d], as far back as the document of t reaches.

    x         [B, S, C]
    weight    [C, K], the last column is the token's own
    segments  int [B, S], from `sightline.masks.segments`
    past      [B, K - 1, C], the tokens before these: they are of segment 0
    """
    length, reach = x.shape[1], weight.shape[1] - 1
    y = x * weight[:, reach]
    x = F.pad(x, (0, 0, reach, 0)) if past is None else torch.cat([past, x], dim=1)
    own = segments
    segments = F.pad(segments, (reach, 0))
    for back in range(1, reach + 1):
        before = slice(reach - back, reach - back + length)
        y = y + x[:, before] * weight[:, reach - back] * (segments[:, before] == own)[..., None]
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
    """A memory M [D, E] a head, anew in each document, that every token fades, corrects and reads (arXiv 2412.06464).

        M = exp(decay) M                fade
        M = M + beta k (v - M' k)'      what it holds for k moves towards v; beta 1 replaces it
        o = M' q                        read

    q, k      [B, S, G, D], G dividing H: value head h reads key head h // (H / G)
    v         [B, S, H, E]
    decay     [B, S, H], at most 0: the log of what stays
    beta      [B, S, H], 0 to 1
    segments  int [B, S], from `sightline.masks.segments`
    state     [B, H, D, E], the memory that segment 0 continues; None is empty

    Returns o [B, S, H, E] and the memory after the last token; computed in float32 where the inputs have less.

    Chunks of C tokens are computed in parallel (the paper's WY form) and handed the memory one by one. Inside a chunk,
    with P[i, j] what stays at token i of what token j wrote, and a_i what stays of the memory M the chunk was handed,
    the corrections u_i = beta_i (v_i - M_i' k_i) solve a triangular system:

        u_i + beta_i sum over j < i of P[i, j] (k_i' k_j) u_j  =  beta_i v_i - beta_i a_i M' k_i

    Between documents P is 0, and a after the first begin: the system falls apart into one for each document.
    """
    dtype, length = v.dtype, v.shape[1]
    with no_autocast(v):
        chunk_size = min(chunk_size, length)
        stays, of_past = _what_stays(_cut(_wide(decay), chunk_size), _cut(segments, chunk_size))
        q, k, v, beta = (_cut(_wide(t), chunk_size).transpose(2, 3) for t in (q, k, v, beta[..., None]))

        repeat = v.shape[2] // k.shape[2]
        kk, qk = k @ k.mT, q @ k.mT  # [N, B, G, C, C], once for the value heads that share them
        q, k, kk, qk = (t.repeat_interleave(repeat, dim=2) if repeat > 1 else t for t in (q, k, kk, qk))
        k_past = k * of_past
        right = torch.cat([v, k_past], dim=-1) * beta
        solved = torch.linalg.solve_triangular(kk * stays * beta, right, upper=False, unitriangular=True)
        without_past, past_keys = solved.split([v.shape[-1], k.shape[-1]], dim=-1)

        if state is None:
            state = v.new_zeros(*v.shape[1:3], k.shape[-1], v.shape[-1])
        states, corrections = [], []
        to_end = (k * stays[..., -1, :, None]).mT
        for begin, keys, write, keep in zip(without_past, past_keys, to_end, of_past[..., -1:, :], strict=True):
            states.append(state)
            corrections.append(begin - keys @ state)
            state = keep * state + write @ corrections[-1]

        o = (q * of_past) @ torch.stack(states) + (qk * stays) @ torch.stack(corrections)
    return o.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length].to(dtype), state


def _what_stays(decay: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """What is left at each token: of what tokens wrote [N, B, H, C, C], of the chunk's first memory [N, B, H, C, 1].

    The logs (decay [N, B, C, H], segments [N, B, C]) are summed from the begin of the document, or of the chunk, by a
    matrix of 0 and 1. One running sum over the row would be cheaper, but its rounding would carry a document into the
    next.
    """
    same = (segments[..., :, None] == segments[..., None, :]).tril()  # [N, B, C, C]
    total = (same.to(decay.dtype) @ decay).mT[..., None]  # [N, B, H, C, 1]
    stays = (total - total.mT).masked_fill(~same[:, :, None], -torch.inf).exp()
    before = torch.cat([torch.zeros_like(segments[:1, :, 0]), segments[:-1, :, -1]])
    continues = segments == before[..., None]
    return stays, total.exp() * continues[:, :, None, :, None]


def _cut(t: Tensor, size: int) -> Tensor:
    """[B, S, ...] -> [N, B, C, ...], N first to be walked over.

    What the last chunk lacks is 0: a key of 0 writes nothing, a decay of 0 fades nothing. Segments go on, so that the
    memory after the last chunk is the last token's.
    """
    batch, length = t.shape[:2]
    missing = -length % size
    if missing:
        more = t[:, -1:].expand(-1, missing) if t.dim() == 2 else t.new_zeros(batch, missing, *t.shape[2:])
        t = torch.cat([t, more], dim=1)
    return t.unflatten(1, (-1, size)).transpose(0, 1)


def _wide(t: Tensor) -> Tensor:
    """In float32, or more where it has more."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class CausalConvolution(nn.Module):
    """A convolution of each channel with K learned conv_kernel, and silu."""

    MATRICES: ClassVar = ()

    def __init__(self, channels: int, conv_kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, conv_kernel))

    def init_weights(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, x: Tensor, mask: Lowered, segments: Tensor, cache: RecurrentCache | None = None) -> Tensor:
        """x [B, S, C] -> [B, S, C]: all channels or, as `exchange.to_full_rows` made x, the local ones."""
        past = None if cache is None else cache.append_inputs(x, self.weight.shape[1] - 1)
        return F.silu(causal_convolution(x, mask.exchange.local_channels(self.weight), segments, past))


class GatedDeltaNet(RecurrentLayer):
    """The layer around the gated delta rule (arXiv 2412.06464), as Qwen3-Next has it.

    Queries, keys and values pass a short convolution; queries and keys are of length 1. How much stays of the memory,
    exp(-exp(A_log) softplus(decay(x) + dt_bias)), each token decides for each value head; A_log and dt_bias are
    Mamba's (arXiv 2312.00752). The output is normed a head and gated.
    """

    MATRICES: ClassVar = ()  # of its own it has only A_log and dt_bias
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
        # Of each key head its query and its key, then the values of the heads that it serves.
        self.sizes = [key_head_dim, key_head_dim, values // num_key_heads]
        self.qkv = nn.Linear(hidden_size, num_key_heads * sum(self.sizes), bias=False)
        self.convolution = CausalConvolution(num_key_heads * sum(self.sizes), conv_kernel)
        self.beta = nn.Linear(hidden_size, num_value_heads, bias=False)
        self.decay = nn.Linear(hidden_size, num_value_heads, bias=False)
        self.A_log = nn.Parameter(torch.empty(num_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_value_heads))
        self.norm = RMSNorm(value_head_dim, norm_eps)
        self.gate = nn.Linear(hidden_size, values, bias=False)
        self.output = nn.Linear(values, hidden_size, bias=False)

    def init_weights(self, std: float, output_std: float) -> None:
        """Weights normal with these spreads, the conv_kernel with K^-0.5; norm and dt_bias 1; exp(A_log) uniform from 0.01 to
        16: some heads keep for hundreds of tokens, some for one."""
        for linear in (self.qkv, self.beta, self.decay, self.gate):
            nn.init.normal_(linear.weight, std=std)
        self.convolution.init_weights()
        with torch.no_grad():
            self.A_log.uniform_(0.01, 16).log_()  # not from 0, whose log is -inf
        nn.init.ones_(self.dt_bias)
        self.norm.init_weights()
        nn.init.normal_(self.output.weight, std=output_std)

    def new_cache(self) -> RecurrentCache:
        """An empty cache for generation."""
        return RecurrentCache()

    def tensor_parallel_units(self) -> dict[str, int]:
        return {"key heads of a memory": self.context_parallel_heads()}

    def context_parallel_heads(self) -> int:
        """Key heads, each with the value heads that it serves."""
        return self.qkv.out_features // sum(self.sizes)

    def flops_per_token(self) -> float:
        """Of its matrices, and 18 a number of each value head's memory: it is read by a key, corrected by an outer
        product and read by a query. The chunked form computes more."""
        return super().flops_per_token() + 18.0 * self.gate.out_features * self.key_head_dim

    def forward(self, x: Tensor, mask: Lowered, encoding: Any = None, cache: RecurrentCache | None = None) -> Tensor:
        """x [B, S, W] -> [B, S, W]. With a cache the mask's queries are these S tokens, its keys all tokens so far.

        The encoding of positions, which attention takes here, is not used: what is read in turn has an order.
        """
        exchange, segments = mask.exchange, mask.segments
        assert segments is not None, "a mask for recurrent layers is lowered with its segments"
        _check_whole(exchange.full_mask, cache)
        # Where processes share a row, each had all heads of some tokens, and now has some heads of all tokens.
        qkv, decay, beta = exchange.to_full_rows(self.qkv(x), self.decay(x), self.beta(x))
        qkv = self.convolution(qkv, mask, segments, cache).unflatten(-1, (-1, sum(self.sizes)))
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = _unit(_wide(q)), _unit(_wide(k))
        v = v.unflatten(-1, (-1, self.value_head_dim)).flatten(2, 3)
        fading, bias = exchange.local_channels(self.A_log), exchange.local_channels(self.dt_bias)
        decay = -_wide(fading).exp() * F.softplus(_wide(decay) + bias)
        state = None if cache is None else cache.state
        o, state = gated_delta_rule(q * self.key_head_dim**-0.5, k, v, decay, beta.sigmoid(), segments, state)
        if cache is not None:
            cache.state = state
        o = exchange.to_local_tokens(o.flatten(2)).unflatten(-1, (-1, self.value_head_dim))
        gate = F.silu(self.gate(x)).unflatten(-1, (-1, self.value_head_dim))
        return self.output((self.norm(o) * gate).flatten(2))


def _unit(x: Tensor) -> Tensor:
    """x / |x| over the last dim, and 0 for 0."""
    return x * (x.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt()


def _check_whole(mask: AttentionMask, cache: RecurrentCache | None) -> None:
    _, queries, keys = mask.shape
    if cache is None and queries != keys:
        raise ValueError(
            f"a recurrent layer walks over all tokens of a row, got a mask of {queries} queries and {keys} keys; "
            "give it whole rows, or the cache that remembers the tokens before"
        )
