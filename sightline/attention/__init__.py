"""Attention that honors a mask exactly, whatever the kernel."""

from sightline.attention.attend import BACKENDS, CHOICES, Lowered, attend, check_backend, lower
from sightline.attention.backend import Backend, Needs
from sightline.attention.exchange import Exchange, Exchanges, LocalExchange, LocalExchanges

__all__ = [
    "BACKENDS",
    "CHOICES",
    "Backend",
    "Exchange",
    "Exchanges",
    "LocalExchange",
    "LocalExchanges",
    "Lowered",
    "Needs",
    "attend",
    "check_backend",
    "lower",
]
