"""What every family's config checks about itself, and how it says so."""

from __future__ import annotations

from typing import Any

from sightline.numbers import check_divisible


def check_positive(config: Any, *fields: str) -> None:
    """ValueError for a field that is not greater than 0."""
    for name in fields:
        if getattr(config, name) <= 0:
            raise ValueError(f"model.{name.replace('_', '-')} must be greater than 0, got {getattr(config, name)}")


def check_heads(heads: int, kv_heads: int, head_size: int) -> None:
    """ValueError for key/value heads that query heads cannot share, and for a head that RoPE cannot turn."""
    check_divisible("model.heads", heads, "model.kv-heads", kv_heads, "key/value heads")
    if head_size % 2:
        raise ValueError(f"model.head-size must be even, because RoPE turns pairs of channels, got {head_size}")


def check_experts(experts: int, experts_per_token: int) -> None:
    """ValueError for a token that needs more experts than there are."""
    if experts_per_token > experts:
        raise ValueError(
            f"model.experts-per-token is {experts_per_token}, but there are only {experts} experts; "
            "lower it or raise model.experts"
        )
