"""ContextMask: what the tokens a process has of each row may see, and how the keys they see come to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from sightline.masks import AttentionMask
from sightline.parallel.context.exchange import Route, build_route, travel


class WholeRows(NamedTuple):
    """What layers that walk along whole rows need.

    mask   of all tokens of the rows
    owned  int64 [B, degree, S / degree] on the CPU: the tokens of each row that each process has
    """

    mask: AttentionMask
    owned: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class ContextMask(AttentionMask):
    """The mask of some tokens of each row, over the keys that `gather` brings, which lie in the order of the row.

    start, stop  int32 [B, S / degree, K]
    send         int64 [B, degree, M] on the CPU: which of the own tokens go to each process, -1 beyond
    receive      int64 [B, degree, N] on the CPU: the places, of the T, of the keys that come from each process
    group        the processes that share the rows
    rows         for models with layers that walk along whole rows

    Made by `split_context` from a mask of whole rows, which is the one to cut and to join with others. Everything has
    B first, so a pipeline cuts it with its rows.
    """

    send: Tensor
    receive: Tensor
    group: dist.ProcessGroup
    rows: WholeRows | None = None

    def to(self, device: torch.device | str) -> ContextMask:
        """The same mask on another device. What the host reads to send the right number of keys stays on the CPU."""
        rows = self.rows and self.rows._replace(mask=self.rows.mask.to(device))
        start, stop = (side.to(device, non_blocking=True) for side in (self.start, self.stop))
        return ContextMask(start, stop, self.key_length, self.send, self.receive, self.group, rows)

    @torch.compiler.disable  # how much travels is known to the host and new in every batch: no graph for a compiler
    def gather(self, *tensors: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """The keys that this process's tokens see, wherever they are: [B, heads, S / degree, D] -> [B, heads, T, D].

        All tensors go in one message; they may differ in heads and D.
        """
        rows = torch.cat([t.transpose(1, 2).flatten(2) for t in tensors], dim=-1).flatten(0, 1)
        shapes = [(t.shape[0], self.key_length, t.shape[1], t.shape[3]) for t in tensors]
        return _Gathering(travel(rows, self._keys), shapes)

    @property
    def whole_rows(self) -> AttentionMask:
        assert self.rows is not None, "a model whose layers walk along whole rows says so in `row_heads`"
        return self.rows.mask

    @torch.compiler.disable
    def to_whole_rows(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        degree = self.group.size()
        dealt = torch.cat([t.unflatten(-1, (degree, -1)) for t in tensors], dim=-1)  # [B, S / degree, degree, C]
        whole = travel(dealt.transpose(1, 2).flatten(0, 2), self._rows)()
        whole = whole.unflatten(0, (len(dealt), -1))
        return whole.split([t.shape[-1] // degree for t in tensors], dim=-1)

    @torch.compiler.disable
    def to_own_tokens(self, x: Tensor) -> Tensor:
        degree = self.group.size()
        dealt = travel(x.flatten(0, 1), self._rows.back())()
        return dealt.view(len(x), degree, -1, x.shape[-1]).transpose(1, 2).flatten(2)

    def own_share(self, weight: Tensor) -> Tensor:
        return weight.chunk(self.group.size())[self.group.rank()]

    @cached_property
    def _keys(self) -> Route:
        return build_route(self.send, self.shape[1], self.receive, self.key_length, self.group, self.device)

    @cached_property
    def _rows(self) -> Route:
        """From [B, degree, S / degree], the own tokens with the channels of each process, to [B, S]."""
        assert self.rows is not None
        owned = self.rows.owned
        length = owned.shape[1] * owned.shape[2]
        send = torch.arange(length).view(1, *owned.shape[1:]).expand_as(owned)
        return build_route(send, length, owned, length, self.group, self.device)


class _Gathering:
    """Keys on their way: several tensors side by side in rows, and the shapes [B, T, heads, D] they will have."""

    def __init__(self, arrive: Callable[[], Tensor], shapes: list[tuple[int, int, int, int]]) -> None:
        self.arrive, self.shapes = arrive, shapes

    @torch.compiler.disable
    def __call__(self) -> tuple[Tensor, ...]:
        parts = self.arrive().split([heads * size for _, _, heads, size in self.shapes], dim=-1)
        return tuple(
            part.unflatten(0, shape[:2]).unflatten(2, shape[2:]).transpose(1, 2)
            for part, shape in zip(parts, self.shapes, strict=True)
        )


def _flatten(mask: ContextMask) -> tuple[list[Any], Any]:
    return [mask.start, mask.stop, mask.send, mask.receive, mask.rows], (mask.key_length, mask.group)


def _flatten_with_keys(mask: ContextMask) -> tuple[list[tuple[pytree.KeyEntry, Any]], Any]:
    children, context = _flatten(mask)
    names = ("start", "stop", "send", "receive", "rows")
    return [(pytree.GetAttrKey(name), child) for name, child in zip(names, children, strict=True)], context


def _unflatten(children: list[Any], context: Any) -> ContextMask:
    # No check: tree_map may put anything where the tensors were (shapes, chunk specs, None).
    mask = object.__new__(ContextMask)
    for name, value in zip(("start", "stop", "send", "receive", "rows"), children, strict=True):
        object.__setattr__(mask, name, value)
    object.__setattr__(mask, "key_length", context[0])
    object.__setattr__(mask, "group", context[1])
    return mask


# The base's registration does not reach here: a pytree is known by its exact type.
pytree.register_pytree_node(
    ContextMask,
    _flatten,
    _unflatten,  # type: ignore[arg-type]
    serialized_type_name="sightline.parallel.context.ContextMask",
    flatten_with_keys_fn=_flatten_with_keys,  # type: ignore[arg-type]
)
