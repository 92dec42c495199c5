"""Attention under an AttentionMask, with the same results from every backend."""

from sightline.attention.attend import BACKENDS, CHOICES, Lowered, attend, check_backend, lower
from sightline.attention.backend import KernelRequirements
from sightline.attention.exchange import Exchange, Exchanges, LocalExchanges
from sightline.attention.one_query import OneQuery, lower_queries

__all__ = [
    "BACKENDS",
    "CHOICES",
    "Exchange",
    "Exchanges",
    "KernelRequirements",
    "LocalExchanges",
    "Lowered",
    "OneQuery",
    "attend",
    "check_backend",
    "lower",
    "lower_queries",
]
