"""Checks of the values in a config: their types, and the largest sizes of a model.

Configs are read from files that others wrote, so a value may have any type that JSON has, and any size. Everything is
checked before memory is allocated for it.
"""

from __future__ import annotations

import dataclasses
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
LARGEST_FLOAT = 1e30
KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Path: "text", list: "a list"}
KINDS |= {dict: "an object", tuple: "a list", type(None): "null"}


def check_values(config: Any, prefix: str) -> None:
    """Check the type of each field of a config dataclass, and the sizes in `LIMITS`; `prefix` starts the option names.

    Raises:
        ValueError: if a value has another type than its field or is too large; the message has the name of the option.
    """
    owner: Any = type(config)
    for name, kind in types_of(owner).items():
        check_value(kind, getattr(config, name), f"{prefix}.{name.replace('_', '-')}")
        check_limit(name, getattr(config, name), f"{prefix}.{name.replace('_', '-')}")


def check_value(kind: Any, value: Any, name: str) -> None:
    """Check that a value has the type `kind`; `name` describes it in the message.

    Raises:
        ValueError: if it has another type, or is a number that is not finite or absurdly large.
    """
    if not has_type(kind, value):
        raise ValueError(f"{name} is {reprlib.repr(value)}; expected {describe_type(kind)}")
    if isinstance(value, int | float) and not -LARGEST_FLOAT <= value <= LARGEST_FLOAT:
        raise ValueError(f"{name} is {reprlib.repr(value)}; expected a number of at most {LARGEST_FLOAT:g}")


def check_limit(field: str, value: Any, name: str) -> None:
    """Check that a value of the field `field` is an integer of at most `LIMITS[field]`; other fields have no limit.

    Raises:
        ValueError: if it is not an integer, or too large.
    """
    if field in LIMITS and value is not None:
        check_value(int, value, name)
        if value > LIMITS[field]:
            raise ValueError(f"{name} is {value}; expected at most {LIMITS[field]}: no model is larger, correct it")


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
