"""Checks of the values of config fields. Errors name a field as its command line option."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

LARGEST = 2**31 - 1
"""Largest integer of a field: masks, positions and many kernels count in int32."""


def option(owner: str, name: str) -> str:
    """Return the name of a field in errors: `training.sequence-length`."""
    return f"{owner}.{name}".lstrip(".").replace("_", "-")


def check_fields(owner: str, config: Any) -> None:
    """Check every field of a config by its type, including nested configs.

    owner  name of the config in options, such as `training`

    Raises:
        ValueError: if a number is not finite or an integer too large, or a choice is none of those of the field.
    """
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value = option(owner, field.name), getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_fields(name, value)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{name} must be a finite number, got {value}")
            if isinstance(number, int) and abs(number) > LARGEST:
                raise ValueError(f"{name} must be at most {LARGEST} (2^31 - 1), got {value}")
        choices = typing.get_args(kinds[field.name])
        if typing.get_origin(kinds[field.name]) is typing.Literal and value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def check_positive(owner: str, config: Any, *fields: str) -> None:
    """Raise ValueError if one of the fields is not greater than 0."""
    for name in fields:
        if getattr(config, name) <= 0:
            raise ValueError(f"{option(owner, name)} must be greater than 0, got {getattr(config, name)}")


def check_not_negative(owner: str, config: Any, *fields: str) -> None:
    """Raise ValueError if one of the fields is less than 0."""
    for name in fields:
        if getattr(config, name) < 0:
            raise ValueError(f"{option(owner, name)} must be at least 0, got {getattr(config, name)}")


def check_seed(name: str, seed: int) -> None:
    """Raise ValueError if PyTorch's random number generators do not take the seed."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"{name} must be at least 0 and less than 2^64 (64 bits), got {seed}")
