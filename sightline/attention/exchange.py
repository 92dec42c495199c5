"""Exchange of keys, values and rows between ranks, as attention and recurrent layers use it."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sightline.masks import AttentionMask


class Pending(Protocol):
    """Tensors whose communication may be in flight."""

    def wait(self) -> tuple[Tensor, ...]:
        """Wait for the communication and return the tensors."""
        ...


class Exchange(Protocol):
    """Communication for the tokens of one mask, whose rows may be sharded across ranks by context parallelism.

    full_mask  mask of all tokens of the rows
    """

    @property
    def full_mask(self) -> AttentionMask: ...

    def start(self, *tensors: Tensor) -> Pending:
        """Start sending the keys that the mask's intervals index: local [B, heads, S, D] -> [B, heads, T, D] each.

        Computation between `start` and `wait` overlaps with the communication.
        """
        ...

    def to_full_rows(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Reshard from tokens to channels: [B, local tokens, channels] -> [B, S, local channels] each."""
        ...

    def to_local_tokens(self, x: Tensor) -> Tensor:
        """Inverse of `to_full_rows`."""
        ...

    def local_channels(self, weight: Tensor) -> Tensor:
        """Return the rows of a weight [channels, ...] for the local channels of `to_full_rows`."""
        ...


class Exchanges(Protocol):
    """Factory of a model that creates the Exchange for each mask of a forward."""

    def bind(self, mask: Any, device: torch.device) -> tuple[AttentionMask, Exchange]:
        """Return the mask of the local queries, and the Exchange that provides the keys it indexes."""
        ...


class CompletedExchange(NamedTuple):
    """A Pending whose tensors are already available."""

    tensors: tuple[Tensor, ...]

    def wait(self) -> tuple[Tensor, ...]:
        return self.tensors


class LocalExchange(NamedTuple):
    """Exchange without communication: all tokens of the rows are local."""

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
    """Exchanges of a model without context parallelism: every rank has full rows."""

    def bind(self, mask: AttentionMask, device: torch.device) -> tuple[AttentionMask, LocalExchange]:
        mask = mask.cpu()
        return mask, LocalExchange(mask)
