"""Positions of packed rows: those of each document, and refusals of models that would compute others."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from sightline.hf.documents import Documents


def takes_positions(model: nn.Module, documents: Documents, kwargs: Mapping[str, Any]) -> bool:
    """Return whether a call states documents without positions, for a model in which they would run on.

    Models with M-RoPE compute their own, which are relative.
    """
    if kwargs.get("position_ids") is not None or documents.masks is not None:
        return False
    rope = getattr(_text_config(model), "rope_parameters", None) or {}
    return "mrope_section" not in rope and "position_ids" in inspect.signature(type(model).forward).parameters


def check_positions(model: nn.Module, documents: Documents, position_ids: Tensor | None, start: int) -> None:
    """Check that a model computes the same from the positions of packed rows as from each document alone.

    start  position of a document's first token

    Raises:
        ValueError: if it does not.
    """
    if start and position_ids is not None and bool((position_ids < start).any()):
        raise ValueError(
            f"the positions of {type(model).__name__} start at {start}, after those of padding, but position_ids "
            f"contain {int(position_ids.min())}; add {start}, as PackedCollator(position_start={start}) does"
        )
    _check_temperature(model, documents.ids.shape[1])
    if documents.masks is None and documents.parents is None:
        _check_rope(model, documents, position_ids)


def _check_temperature(model: nn.Module, length: int) -> None:
    """Refuse rows in which Llama 4 scales queries by their index in the row, which differs from that in a document."""
    config = _text_config(model)
    scale = getattr(config, "floor_scale", None)
    if scale and getattr(config, "attn_temperature_tuning", None) and length >= scale:
        raise ValueError(
            f"{type(model).__name__}: attn_temperature_tuning scales queries by their index in the row, not in their "
            f"document, from index {scale} on; pack rows of fewer than {scale} tokens, got {length}, "
            "or set config.attn_temperature_tuning to False"
        )


def _check_rope(model: nn.Module, documents: Documents, position_ids: Tensor | None) -> None:
    """Refuse documents whose frequencies depend on the longest document of the forward."""
    for kinds, limit in _limited_ropes(model):
        last = documents.index_in_document[documents.ids >= 0]
        is_last = last.diff(append=last.new_tensor([0])) != 1
        lengths = last[is_last] + 1
        longest = int(lengths.max()) if position_ids is None else int(position_ids.max()) + 1
        shortest = int(lengths.min())
        if longest > limit and shortest < longest and ("dynamic" in kinds or shortest <= limit):
            raise ValueError(
                f"{type(model).__name__}: RoPE of type {', '.join(sorted(kinds))} takes the frequencies of all "
                f"documents from the largest position of the forward, {longest - 1}, which differ from those of a "
                f"document of {shortest} tokens alone; pack documents and positions below {limit} only, and give "
                "longer documents rows and forwards of their own"
            )


def check_divided_positions(model: nn.Module, position_ids: Tensor) -> None:
    """Check that ranks with a part of the tokens of each row compute the same as one with all of them.

    Raises:
        ValueError: if they do not.
    """
    for kinds, limit in _limited_ropes(model):
        if (longest := int(position_ids.max()) + 1) > limit:
            raise ValueError(
                f"{type(model).__name__}: RoPE of type {', '.join(sorted(kinds))} takes its frequencies from the "
                f"largest position of the forward, here {longest - 1}, and a rank has a part of them; use rows "
                f"of at most {limit} tokens with context parallelism"
            )


def has_limited_rope(config: Any, length: int) -> bool:
    """Return whether RoPE of a config takes its frequencies from the largest position of a row of this length."""
    parameters: Any = getattr(config, "rope_parameters", None) or {}
    nested = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    longest: Any = getattr(config, "max_position_embeddings", 0)
    limited = [part for part in nested if part.get("rope_type") in ("dynamic", "longrope")]
    return any(length > (part.get("original_max_position_embeddings") or longest) for part in limited)


def _limited_ropes(model: nn.Module) -> Iterator[tuple[set[Any], int]]:
    """Yield the kinds of RoPE whose frequencies depend on the largest position, and from which position on."""
    for rope in model.modules():
        kinds = getattr(rope, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if kinds & {"dynamic", "longrope"} and hasattr(rope, "original_max_seq_len"):
            yield kinds, _original_length(rope, kinds)


def _original_length(rope: nn.Module, kinds: set[Any]) -> int:
    """Return the most tokens for which RoPE keeps its first frequencies."""
    if "longrope" not in kinds:
        return int(rope.original_max_seq_len)  # type: ignore[arg-type]
    parameters: Any = rope.config.rope_parameters  # type: ignore[union-attr]
    nested = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return min(p["original_max_position_embeddings"] for p in nested if "original_max_position_embeddings" in p)


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
