"""All-to-all exchange of keys and full rows between context-parallel ranks, with gradients."""

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
    """Makes the exchange of each mask for a model whose rows are sharded across the ranks of `group`.

    Works without a model too: see `docs/context_parallel.md`.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def bind(self, mask: ContextShard | AttentionMask, device: torch.device) -> tuple[AttentionMask, Exchange]:
        """Return the mask of the local queries and the exchange that fetches its keys: a local one for a full mask."""
        if not isinstance(mask, ContextShard):
            return LocalExchanges().bind(mask, device)
        return mask.mask, ShardExchange(mask, self.group, device)


class ShardExchange:
    """The exchange of keys and of full rows for one shard; implements `sightline.attention.Exchange`.

    Index tensors are copied to the device on construction; the host never waits for the device.
    """

    def __init__(self, shard: ContextShard, group: dist.ProcessGroup, device: torch.device) -> None:
        self.shard, self.group = shard, group
        _, tokens, keys = shard.mask.shape
        self._key_plan = build_exchange_plan(shard.send, tokens, shard.receive, keys, group, device)
        self._row_plan: ExchangePlan | None = None
        if (owned := shard.owned_tokens) is not None:
            # From the local tokens with the channels of each rank, [B, degree, S / degree], to all tokens, [B, S].
            length = owned.shape[1] * owned.shape[2]
            send = torch.arange(length).view(1, *owned.shape[1:]).expand_as(owned)
            self._row_plan = build_exchange_plan(send, length, owned, length, group, device)

    @property
    def full_mask(self) -> AttentionMask:
        assert self.shard.full_mask is not None, (
            "a shard has the full mask only if the model's `context_parallel_heads` is not None"
        )
        return self.shard.full_mask

    @disable_compiler  # message sizes differ in every batch and are read on the host: not traceable
    def start(self, *tensors: Tensor) -> PendingKeys:
        """Send all tensors in one message; they may differ in heads and D."""
        rows = torch.cat([t.transpose(1, 2).flatten(2) for t in tensors], dim=-1).flatten(0, 1)
        shapes = [(t.shape[0], self.shard.mask.key_length, t.shape[1], t.shape[3]) for t in tensors]
        return PendingKeys(start_exchange(rows, self._key_plan), shapes)

    @disable_compiler
    def to_full_rows(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        assert self._row_plan is not None
        degree = self.group.size()
        by_rank = torch.cat([t.unflatten(-1, (degree, -1)) for t in tensors], dim=-1)  # [B, S / degree, degree, C]
        rows = start_exchange(by_rank.transpose(1, 2).flatten(0, 2), self._row_plan)()
        rows = rows.unflatten(0, (len(by_rank), -1))
        return rows.split([t.shape[-1] // degree for t in tensors], dim=-1)

    @disable_compiler
    def to_local_tokens(self, x: Tensor) -> Tensor:
        assert self._row_plan is not None
        degree = self.group.size()
        by_rank = start_exchange(x.flatten(0, 1), self._row_plan.reverse())()
        return by_rank.view(len(x), degree, -1, x.shape[-1]).transpose(1, 2).flatten(2)

    def local_channels(self, weight: Tensor) -> Tensor:
        return weight.chunk(self.group.size())[self.group.rank()]


class PendingKeys:
    """Keys that are being received: one message with several tensors, and their shapes (B, T, heads, D)."""

    def __init__(self, finish: Callable[[], Tensor], shapes: list[tuple[int, int, int, int]]) -> None:
        self.finish, self.shapes = finish, shapes

    @disable_compiler
    def wait(self) -> tuple[Tensor, ...]:
        parts = self.finish().split([heads * size for _, _, heads, size in self.shapes], dim=-1)
        return tuple(
            part.unflatten(0, shape[:2]).unflatten(2, shape[2:]).transpose(1, 2)
            for part, shape in zip(parts, self.shapes, strict=True)
        )


class ExchangePlan(NamedTuple):
    """Indices of an uneven all-to-all of rows [N, C] within a group, for one rank.

    send_index, send_sizes           int64 [.], the rows to send, ordered by target rank; their number for each rank
    receive_index, receive_sizes     int64 [.], the output rows of those received, ordered by source rank; their number
    local_index, local_output_index  int64 [.], the rows that stay on this rank, and their output rows
    output_length                    number of output rows; those in no index are 0

    Index tensors are on the device of the rows, sizes on the host, which never waits for the device.
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
        """Return the inverse of a plan that puts each input row into exactly one output row."""
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
    """Build the plan of a batch from the indices within each of its rows, which are on the CPU.

    send     int64 [B, degree, M]: which of the `tokens` of a row go to each rank, padded with -1
    receive  int64 [B, degree, N]: the output indices, below `output_length`, of those from each rank, padded with -1
    """
    rank = dist.get_rank(group)
    send_index, send_sizes, local_index = _split_by_rank(send, tokens, rank)
    receive_index, receive_sizes, local_output_index = _split_by_rank(receive, output_length, rank)
    send_index, receive_index, local_index, local_output_index = (
        t.to(device, non_blocking=True) for t in (send_index, receive_index, local_index, local_output_index)
    )
    return ExchangePlan(
        send_index=send_index,
        send_sizes=send_sizes,
        receive_index=receive_index,
        receive_sizes=receive_sizes,
        local_index=local_index,
        local_output_index=local_output_index,
        output_length=len(receive) * output_length,
        group=group,
    )


def _split_by_rank(index: Tensor, stride: int, rank: int) -> tuple[Tensor, list[int], Tensor]:
    """Convert indices within each row, int64 [B, degree, M], to indices in the concatenated rows of length `stride`.

    Returns the indices of the other ranks in rank order, their number for each rank, and the indices of `rank` itself.
    """
    valid = (index >= 0).transpose(0, 1)
    flat = (index + stride * torch.arange(len(index))[:, None, None]).transpose(0, 1)
    local = flat[rank][valid[rank]]
    remote = valid.clone()
    remote[rank] = False
    return flat[remote], remote.sum(dim=(1, 2)).tolist(), local


def start_exchange(rows: Tensor, plan: ExchangePlan) -> Callable[[], Tensor]:
    """Start the all-to-all of `rows` [N, C] and return a function that waits for its result [output_length, C].

    The backward is asynchronous too: it starts the exchange of the gradients at the wait and finishes it at the start,
    and adds the gradients of a row that was sent to several ranks. Computation between the start and the wait therefore
    overlaps with communication in both directions.
    """
    gradient_exchange: list[Tensor] = []
    received = _StartExchange.apply(rows, plan, gradient_exchange)
    return lambda: _FinishExchange.apply(rows, received, plan, gradient_exchange)


class _StartExchange(torch.autograd.Function):
    """Forward: start the exchange of rows. Backward: wait for their gradients."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: ExchangePlan, gradient_exchange: list[Tensor]) -> Tensor:
        ctx.plan, ctx.gradient_exchange, ctx.length = plan, gradient_exchange, len(rows)
        return all_to_all(rows.index_select(0, plan.send_index), plan.send_sizes, plan.receive_sizes, plan.group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_received: Tensor) -> tuple[Tensor | None, ...]:
        # _FinishExchange.backward has sent `d_received` to its owners; `gradient_exchange` receives that of sent rows.
        d_rows = d_received.new_zeros(ctx.length, *d_received.shape[1:])
        return d_rows.index_add_(0, ctx.plan.send_index, wait(ctx.gradient_exchange.pop())), None, None


class _FinishExchange(torch.autograd.Function):
    """Forward: wait for the rows and write them to the output. Backward: start the exchange of their gradients."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, received: Tensor, plan: ExchangePlan, gradient_exchange: list[Tensor]
    ) -> Tensor:
        ctx.plan, ctx.gradient_exchange, ctx.length = plan, gradient_exchange, len(rows)
        out = rows.new_zeros(plan.output_length, *rows.shape[1:])
        out.index_copy_(0, plan.local_output_index, rows.index_select(0, plan.local_index))
        return out.index_copy_(0, plan.receive_index, wait(received))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        plan = ctx.plan
        d_received = d_out.index_select(0, plan.receive_index)
        ctx.gradient_exchange.append(all_to_all(d_received, plan.receive_sizes, plan.send_sizes, plan.group))
        d_rows = d_out.new_zeros(ctx.length, *d_out.shape[1:])
        d_rows.index_copy_(0, plan.local_index, d_out.index_select(0, plan.local_output_index))
        return d_rows, d_received, None, None
