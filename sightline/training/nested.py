"""Nested dicts, such as the state of a model and the settings of a run."""

from __future__ import annotations

from typing import Any


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts: {"a": {"b": 1}} becomes {"a.b": 1}."""
    if not isinstance(values, dict):
        return {prefix: values}
    flattened: dict[str, Any] = {}
    for name, value in values.items():
        flattened |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return flattened
