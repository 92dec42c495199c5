"""How keys, values and whole rows reach the queries of this process."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sightline.masks import AttentionMask


class Pending(Protocol):
    """Tensors on their way."""

    def wait(self) -> tuple[Tensor, ...]:
        """The tensors, once they have arrived."""
        ...


class Exchange(Protocol):
    """What attention and recurrent layers do with one mask's tokens where several processes may share a row.

    full_mask  the mask of all tokens of the rows
    """

    @property
    def full_mask(self) -> AttentionMask: ...

    def start(self, *tensors: Tensor) -> Pending:
        """Start to bring the keys that the mask's intervals index: [B, heads, S, D] of the local tokens ->
        [B, heads, T, D] each. What is computed before `wait` hides the communication."""
        ...

    def to_full_rows(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """[B, local tokens, channels] -> [B, S, local channels] each."""
        ...

    def to_local_tokens(self, x: Tensor) -> Tensor:
        """Inverse of `to_full_rows`."""
        ...

    def local_channels(self, weight: Tensor) -> Tensor:
        """The part of a weight [channels, ...] that belongs to the channels of `to_full_rows`."""
        ...


class Exchanges(Protocol):
    """What a model holds: makes the Exchange of each mask that it is given."""

    def bind(self, mask: Any, device: torch.device) -> tuple[AttentionMask, Exchange]:
        """The mask of the local queries, and how the keys it indexes reach them."""
        ...


class CompletedExchange(NamedTuple):
    """Tensors that nobody has to send."""

    tensors: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, ...]:
        return self.tensors


class LocalExchange(NamedTuple):
    """All tokens of the rows are on this process: nothing is sent."""

    full_mask: AttentionMask

    def start(self, *tensors: Tensor) -> CompletedExchange:
        return CompletedExchange(tensors)

    def to_full_rows(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    def to_local_tokens(self, x: Tensor) -> Tensor:
        return x

    def local_channels(self, weight: Tensor) -> Tensor:
        return weight


class LocalExchanges:
    """The exchanges of a model whose rows are whole on every process."""

    def bind(self, mask: AttentionMask, device: torch.device) -> tuple[AttentionMask, LocalExchange]:
        mask = mask.cpu()
        return mask, LocalExchange(mask)
