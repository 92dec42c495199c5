"""Attention that honors a mask exactly, whatever the kernel."""

from sightline.attention.attend import BACKENDS, CHOICES, Lowered, attend, check_backend, lower
from sightline.attention.backend import Needs
from sightline.attention.exchange import Exchange, Exchanges, LocalExchanges

__all__ = [
    "BACKENDS",
    "CHOICES",
    "Exchange",
    "Exchanges",
    "LocalExchanges",
    "Lowered",
    "Needs",
    "attend",
    "check_backend",
    "lower",
]
