"""Attention under an AttentionMask, with the same results from every backend."""

from sightline.attention.attend import BACKENDS, CHOICES, Lowered, attend, check_backend, lower
from sightline.attention.backend import KernelRequirements
from sightline.attention.exchange import Exchange, Exchanges, LocalExchanges

__all__ = [
    "BACKENDS",
    "CHOICES",
    "Exchange",
    "Exchanges",
    "KernelRequirements",
    "LocalExchanges",
    "Lowered",
    "attend",
    "check_backend",
    "lower",
]
