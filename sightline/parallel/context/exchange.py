"""Rows of numbers on their way between processes, with gradients on their way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from sightline.attention import LocalExchanges
from sightline.attention.exchange import Exchange
from sightline.masks import AttentionMask
from sightline.parallel.context.shard import ContextShard
from sightline.parallel.torch_private import all_to_all, wait
from sightline.torch_private import disable_compiler


class ContextExchange:
    """The exchanges of a model whose rows are shared by the processes of `group`.

    They work without a model too: `docs/context_parallel.md` shows how.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def bind(self, mask: ContextShard | AttentionMask, device: torch.device) -> tuple[AttentionMask, Exchange]:
        """The mask of the local queries, and the exchange that brings its keys; a whole mask needs none."""
        if not isinstance(mask, ContextShard):
            return LocalExchanges().bind(mask, device)
        return mask.mask, ShardExchange(mask, self.group, device)


class ShardExchange:
    """How the keys, and the whole rows, of one shard reach this process: see `sightline.attention.Exchange`.

    Index tensors are copied to the device when it is made; the host never waits for the device.
    """

    def __init__(self, shard: ContextShard, group: dist.ProcessGroup, device: torch.device) -> None:
        self.shard, self.group = shard, group
        _, tokens, keys = shard.mask.shape
        self._keys = build_exchange_plan(shard.send, tokens, shard.receive, keys, group, device)
        self._rows: ExchangePlan | None = None
        if (
            shard.owned_tokens is not None
        ):  # from [B, degree, S / degree], the own tokens with each rank's channels, to [B, S]
            length = shard.owned_tokens.shape[1] * shard.owned_tokens.shape[2]
            send = torch.arange(length).view(1, *shard.owned_tokens.shape[1:]).expand_as(shard.owned_tokens)
            self._rows = build_exchange_plan(send, length, shard.owned_tokens, length, group, device)

    @property
    def full_mask(self) -> AttentionMask:
        assert self.shard.full_mask is not None, (
            "a model whose layers walk along whole rows says so in `context_parallel_heads`"
        )
        return self.shard.full_mask

    @disable_compiler  # how much is sent is known to the host and new in every batch: no graph for a compiler
    def start(self, *tensors: Tensor) -> PendingKeys:
        """All tensors go in one message; they may differ in heads and D."""
        rows = torch.cat([t.transpose(1, 2).flatten(2) for t in tensors], dim=-1).flatten(0, 1)
        shapes = [(t.shape[0], self.shard.mask.key_length, t.shape[1], t.shape[3]) for t in tensors]
        return PendingKeys(start_exchange(rows, self._keys), shapes)

    @disable_compiler
    def to_full_rows(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        assert self._rows is not None
        degree = self.group.size()
        dealt = torch.cat([t.unflatten(-1, (degree, -1)) for t in tensors], dim=-1)  # [B, S / degree, degree, C]
        whole = start_exchange(dealt.transpose(1, 2).flatten(0, 2), self._rows)()
        whole = whole.unflatten(0, (len(dealt), -1))
        return whole.split([t.shape[-1] // degree for t in tensors], dim=-1)

    @disable_compiler
    def to_local_tokens(self, x: Tensor) -> Tensor:
        assert self._rows is not None
        degree = self.group.size()
        dealt = start_exchange(x.flatten(0, 1), self._rows.reverse())()
        return dealt.view(len(x), degree, -1, x.shape[-1]).transpose(1, 2).flatten(2)

    def local_channels(self, weight: Tensor) -> Tensor:
        return weight.chunk(self.group.size())[self.group.rank()]


class PendingKeys:
    """Keys on their way: several tensors side by side in rows, and the shapes [B, T, heads, D] they will have."""

    def __init__(self, arrive: Callable[[], Tensor], shapes: list[tuple[int, int, int, int]]) -> None:
        self.arrive, self.shapes = arrive, shapes

    @disable_compiler
    def wait(self) -> tuple[Tensor, ...]:
        parts = self.arrive().split([heads * size for _, _, heads, size in self.shapes], dim=-1)
        return tuple(
            part.unflatten(0, shape[:2]).unflatten(2, shape[2:]).transpose(1, 2)
            for part, shape in zip(parts, self.shapes, strict=True)
        )


class ExchangePlan(NamedTuple):
    """How rows [n, C] start_exchange between the processes of a group, as one of them sees it.

    sent, sent_sizes        int64 [.], rows that go out, those to process 0 first; how many go to each
    places, received_sizes  int64 [.], where the rows that come are put, those of process 0 first; how many come of each
    kept, kept_places       int64 [.], rows that stay, and where they are put
    slots                   rows of the result; those where nothing is put are 0

    The index tensors lie on the device of the rows, the sizes on the host, which never waits for the device.
    """

    send_index: Tensor
    send_sizes: list[int]
    receive_index: Tensor
    receive_sizes: list[int]
    local_index: Tensor
    local_output_index: Tensor
    output_length: int
    group: dist.ProcessGroup

    def reverse(self) -> ExchangePlan:
        """The way back, where each row goes to one place."""
        return ExchangePlan(
            send_index=self.receive_index,
            send_sizes=self.receive_sizes,
            receive_index=self.send_index,
            receive_sizes=self.send_sizes,
            local_index=self.local_output_index,
            local_output_index=self.local_index,
            output_length=len(self.send_index) + len(self.local_index),
            group=self.group,
        )


def build_exchange_plan(
    send: Tensor, tokens: int, receive: Tensor, output_length: int, group: dist.ProcessGroup, device: torch.device
) -> ExchangePlan:
    """From places in each row of a batch, on the CPU.

    send     int64 [B, degree, M], which of the `tokens` rows of a batch row go to each process; -1 is none
    receive  int64 [B, degree, N], in which of the `slots` of a batch row those from each process are put; -1 is none
    """
    rank = dist.get_rank(group)
    send_index, send_sizes, local_index = _by_process(send, tokens, rank)
    receive_index, receive_sizes, local_output_index = _by_process(receive, output_length, rank)
    send_index, receive_index, local_index, local_output_index = (
        t.to(device, non_blocking=True) for t in (send_index, receive_index, local_index, local_output_index)
    )
    return ExchangePlan(
        send_index,
        send_sizes,
        receive_index,
        receive_sizes,
        local_index,
        local_output_index,
        len(receive) * output_length,
        group,
    )


def _by_process(index: Tensor, stride: int, rank: int) -> tuple[Tensor, list[int], Tensor]:
    """Places in each row int64 [B, degree, M] -> those in all rows laid end to end, by process; how many each process
    has; and apart from them this process's own."""
    there = (index >= 0).transpose(0, 1)
    flat = (index + stride * torch.arange(len(index))[:, None, None]).transpose(0, 1)
    own = flat[rank][there[rank]]
    others = there.clone()
    others[rank] = False
    return flat[others], others.sum(dim=(1, 2)).tolist(), own


def start_exchange(rows: Tensor, plan: ExchangePlan) -> Callable[[], Tensor]:
    """Send rows [n, C] out; the call of what is returned waits for those that come, [slots, C].

    Backward the same: gradients set out from where the rows came in and are waited for where the rows had set out; rows
    that went to several places get the sum. So what is computed between the two calls hides the way in both directions.
    """
    gradient_exchange: list[Tensor] = []
    came = _StartExchange.apply(rows, plan, gradient_exchange)
    return lambda: _FinishExchange.apply(rows, came, plan, gradient_exchange)


class _StartExchange(torch.autograd.Function):
    """Rows set out; their gradients are waited for."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: ExchangePlan, gradient_exchange: list[Tensor]) -> Tensor:
        ctx.plan, ctx.gradient_exchange, ctx.length = plan, gradient_exchange, len(rows)
        return all_to_all(rows.index_select(0, plan.send_index), plan.send_sizes, plan.receive_sizes, plan.group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_came: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of what came has set out in _FinishExchange.backward, and comes back as that of what was sent.
        d_rows = d_came.new_zeros(ctx.length, *d_came.shape[1:])
        return d_rows.index_add_(0, ctx.plan.send_index, wait(ctx.gradient_exchange.pop())), None, None


class _FinishExchange(torch.autograd.Function):
    """Rows are waited for and put in their places; their gradients set out."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, came: Tensor, plan: ExchangePlan, gradient_exchange: list[Tensor]) -> Tensor:
        ctx.plan, ctx.gradient_exchange, ctx.length = plan, gradient_exchange, len(rows)
        out = rows.new_zeros(plan.output_length, *rows.shape[1:])
        out.index_copy_(0, plan.local_output_index, rows.index_select(0, plan.local_index))
        return out.index_copy_(0, plan.receive_index, wait(came))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        d_came = d_out.index_select(0, plan.receive_index)
        ctx.gradient_exchange.append(all_to_all(d_came, plan.receive_sizes, plan.send_sizes, plan.group))
        d_rows = d_out.new_zeros(ctx.length, *d_out.shape[1:])
        d_rows.index_copy_(0, plan.local_index, d_out.index_select(0, plan.local_output_index))
        return d_rows, d_came, None, None
