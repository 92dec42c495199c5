"""Validation shared by the model configs of all families."""

from __future__ import annotations

from typing import Any

from sightline import numbers
from sightline.config import checks


def check_positive(config: Any, *fields: str) -> None:
    """Raise ValueError if one of the fields is not greater than 0."""
    checks.check_positive("model", config, *fields)


def option(field: str) -> str:
    """Return the command line name of a model config field: `model.num-kv-heads` for `num_kv_heads`."""
    return checks.option("model", field)


def check_divisible(config: Any, dividend: str, divisor: str, noun: str) -> None:
    """Raise ValueError if the field `divisor` does not divide the field `dividend`; `noun` names the valid divisors."""
    numbers.check_divisible(
        option(dividend), getattr(config, dividend), option(divisor), getattr(config, divisor), noun
    )


def check_heads(config: Any, head_dim: int) -> None:
    """Raise ValueError if `num_kv_heads` does not divide `num_heads`, or if RoPE cannot rotate `head_dim` channels."""
    check_divisible(config, "num_heads", "num_kv_heads", "key/value heads")
    check_rotary("head_dim", head_dim)


def check_rotary(field: str, channels: int) -> None:
    """Raise ValueError if RoPE cannot rotate this number of channels."""
    if channels < 2 or channels % 2:
        raise ValueError(f"{option(field)} must be even, because RoPE rotates pairs of channels, got {channels}")


def check_experts(config: Any) -> None:
    """Raise ValueError if `experts_per_token` exceeds `num_experts`."""
    if config.experts_per_token > config.num_experts:
        raise ValueError(
            f"model.experts-per-token is {config.experts_per_token}, but there are only {config.num_experts} experts; "
            "lower it or raise model.num-experts"
        )
