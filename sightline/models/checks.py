"""What every family's config checks about itself, and how it says so."""

from __future__ import annotations

from typing import Any

from sightline import numbers


def option(field: str) -> str:
    """A field of a model's config as the command line calls it: `model.num-kv-heads`."""
    return f"model.{field.replace('_', '-')}"


def check_positive(config: Any, *fields: str) -> None:
    """ValueError for a field that is not greater than 0."""
    for name in fields:
        if getattr(config, name) <= 0:
            raise ValueError(f"{option(name)} must be greater than 0, got {getattr(config, name)}")


def check_divisible(config: Any, whole: str, part: str, noun: str) -> None:
    """ValueError where the field `part` does not divide the field `whole`; `noun` is what the user may change."""
    numbers.check_divisible(option(whole), getattr(config, whole), option(part), getattr(config, part), noun)


def check_heads(config: Any, head_dim: int) -> None:
    """ValueError for key/value heads that query heads cannot share, and for a head size that RoPE cannot rotate."""
    check_divisible(config, "num_heads", "num_kv_heads", "key/value heads")
    check_rotary("head_dim", head_dim)


def check_rotary(field: str, channels: int) -> None:
    """ValueError for a number of channels that RoPE cannot rotate."""
    if channels < 2 or channels % 2:
        raise ValueError(f"{option(field)} must be even, because RoPE turns pairs of channels, got {channels}")


def check_experts(config: Any) -> None:
    """ValueError for a token that needs more experts than there are."""
    if config.experts_per_token > config.num_experts:
        raise ValueError(
            f"model.experts-per-token is {config.experts_per_token}, but there are only {config.num_experts} experts; "
            "lower it or raise model.num-experts"
        )
