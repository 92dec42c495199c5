"""Checks of the arguments of mask rules, and the mask of one interval per query that most rules return."""

from __future__ import annotations

from numbers import Integral

from torch import Tensor

from sightline.masks.mask import AttentionMask


def single_interval(start: Tensor, stop: Tensor, key_length: int) -> AttentionMask:
    """Build a mask of one interval per query: integers [B, Q] each, empty if stop <= start."""
    return AttentionMask.from_intervals(start.unsqueeze(2), stop.unsqueeze(2), key_length)


def check_token_tensors(rule: str, **tensors: Tensor) -> None:
    """Validate token attributes: integers or booleans [B, S], all of the same shape."""
    shape = next(iter(tensors.values())).shape
    for name, value in tensors.items():
        if value.dim() != 2 or value.is_floating_point():
            raise ValueError(f"{rule}: {name} must be integers [B, S], got {value.dtype} {tuple(value.shape)}")
        if value.shape != shape:
            raise ValueError(f"{rule}: {name} has shape {tuple(value.shape)}; expected {tuple(shape)} like the others")


def check_count(rule: str, name: str, value: int, least: int, meaning: str) -> None:
    """Validate an integer argument of a rule: raise a ValueError unless it is an integer of at least `least`."""
    if not isinstance(value, Integral) or value < least:
        raise ValueError(f"{rule}: {name} {meaning} and must be an integer of at least {least}; got {value!r}")
