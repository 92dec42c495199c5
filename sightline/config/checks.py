"""Checks of the values in a config: their types, and the largest sizes of a model.

Configs are read from files that others wrote, so a value may have any type that JSON has, and any size. Everything is
checked before memory is allocated for it.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any

LIMITS = {
    **dict.fromkeys(("num_layers", "num_dense_layers"), 2048),
    **dict.fromkeys(("vocab_size", "image_token_id"), 2**26),
    **dict.fromkeys(("hidden_size", "q_lora_rank", "kv_lora_rank"), 2**20),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "moe_intermediate_size"), 2**22),
    **dict.fromkeys(("shared_expert_intermediate_size", "projector_hidden_size"), 2**22),
    **dict.fromkeys(("num_heads", "num_kv_heads", "linear_num_key_heads", "linear_num_value_heads"), 2**16),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 2**16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"), 2**16),
    **dict.fromkeys(("num_experts", "experts_per_token", "num_expert_groups", "num_limited_groups"), 2**16),
    "num_shared_experts": 2**10,
    **dict.fromkeys(("patch_size", "num_channels", "position_grid_size"), 2**12),
    "spatial_merge_size": 2**8,
    **dict.fromkeys(("full_attention_interval", "no_rope_layer_interval", "moe_layer_interval"), 2**16),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "temperature_floor", "original_context"), 2**31 - 1),
}
"""{field of a model config: largest value}: at least ten times that of any published model, and so small that the bytes
of a weight fit into 63 bits."""
LARGEST = 2**31 - 1
"""Largest integer of any field: masks, positions and many kernels count in int32."""
LARGEST_FLOAT = 1e30
KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "text", list: "a list"}
KINDS |= {dict: "an object", tuple: "a list", type(None): "null"}


def option(owner: str, name: str) -> str:
    """Return the name of a field in errors: `training.sequence-length`."""
    return f"{owner}.{name}".lstrip(".").replace("_", "-")


def check_values(config: Any, owner: str) -> None:
    """Check the type of each field of a config dataclass, and the sizes in `LIMITS`.

    owner  name of the config in options, such as `training`

    Raises:
        ValueError: if a value has another type than its field or is too large; the message has the name of the option.
    """
    kinds: dict[str, Any] = types_of(type(config))  # type: ignore[arg-type]
    for name, kind in kinds.items():
        value = getattr(config, name)
        check_limit(name, value, option(owner, name))
        check_value(kind, value, option(owner, name))


def check_value(kind: Any, value: Any, name: str) -> None:
    """Check that a value has the type `kind`; `name` describes it in the message.

    Raises:
        ValueError: if it has another type, or is a number that is not finite or too large.
    """
    if typing.get_origin(kind) is typing.Literal and not has_type(kind, value):
        raise ValueError(f"{name} must be one of {', '.join(map(str, typing.get_args(kind)))}, got {value!r}")
    if not has_type(kind, value):
        raise ValueError(f"{name} is {reprlib.repr(value)}; expected {describe_type(kind)}")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise ValueError(f"{name} must be a finite number, got {value}")
        largest = LARGEST if isinstance(number, int) else LARGEST_FLOAT
        if isinstance(number, int | float) and abs(number) > largest:
            raise ValueError(f"{name} must be at most {largest}, got {reprlib.repr(value)}")


def check_limit(field: str, value: Any, name: str) -> None:
    """Check that a value of the field `field` is an integer of at most `LIMITS[field]`; other fields have no limit.

    Raises:
        ValueError: if it is not an integer, or too large.
    """
    if field in LIMITS and value is not None:
        if not has_type(int, value):
            raise ValueError(f"{name} is {reprlib.repr(value)}; expected {describe_type(int)}")
        if value > LIMITS[field]:
            raise ValueError(f"{name} is {reprlib.repr(value)}; expected at most {LIMITS[field]}: no model is larger")


def check_text(name: str, text: str) -> None:
    """Check that text can be encoded for a tokenizer; `name` is that of its option.

    Raises:
        ValueError: if it contains bytes of the command line that are no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} {text!r} contains bytes that are not UTF-8; write it in UTF-8") from None


@cache
def types_of(kind: Any) -> dict[str, Any]:
    """Return {name: type} of the fields of a dataclass."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def has_type(kind: Any, value: Any) -> bool:
    """Return whether a value has the type of a config field; an integer is also a float, and a bool is neither."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or isinstance(kind, typing.TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(has_type(part, value) for part in arguments)
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in arguments)
    if origin is tuple and ... not in arguments:
        return isinstance(value, tuple) and len(value) == len(arguments) and all(map(has_type, arguments, value))
    if kind in (int, float):
        return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def describe_type(kind: Any) -> str:
    """Return the type of a config field as text for messages: `an integer or null`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(describe_type, arguments)))
    if origin is typing.Literal:
        return "one of " + ", ".join(map(repr, arguments))
    if dataclasses.is_dataclass(kind):
        return "an object"
    return KINDS.get(origin or kind, str(kind))


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
