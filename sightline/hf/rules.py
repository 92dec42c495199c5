"""Rules of transformers' mask builders, read from their closures and evaluated as intervals.

A builder of `transformers.masking_utils` hands a mask function to the attention implementation: closures over a window,
a chunk size, padding or document numbers. They are private, so this is the only module that reads them. Tried with
transformers 5.5 to 5.24. A function that it does not know is evaluated pair by pair, exactly.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import reduce
from operator import and_, or_
from typing import Any

import torch
from torch import Tensor

from sightline.masks import AttentionMask, document

logger = logging.getLogger(__name__)

MOST_TOKENS = 8192
"""Longest row for which an unknown rule is evaluated pair by pair."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """Queries and keys for which a rule is evaluated, on the CPU.

    index           int64 [B, Q], index of each query in its row; keys have the indices `key_offset` to `key_offset + T`
    key_length      T
    key_offset      index of the first key: more than 0 with the cache of a sliding window
    in_document     int64 [B, Q], index of each query in its document; None if documents are not known: with a cache
    tree            mask of the tree of shared prefixes, in which windows and chunks go by position; None if documents
                    continue no others
    tree_positions  int64 [B, S], position of each token in the tree; they ascend by 1 within each interval of `tree`
    """

    index: Tensor
    key_length: int
    key_offset: int = 0
    in_document: Tensor | None = None
    tree: AttentionMask | None = None
    tree_positions: Tensor | None = None

    def interval(self, first: Tensor | None, last: Tensor | None) -> AttentionMask:
        """Return the mask of the keys from index `first` to before `last`, int [B, Q]; None is no limit."""
        start = torch.zeros_like(self.index) if first is None else first - self.key_offset
        stop = torch.full_like(self.index, self.key_length) if last is None else last - self.key_offset
        return AttentionMask.from_intervals(start[..., None], stop[..., None], self.key_length)

    def tree_interval(self, first: Tensor, last: Tensor | None) -> AttentionMask:
        """Return the mask of the keys in the tree from position `first` to before `last`, int64 [B, Q]."""
        assert self.tree is not None and self.tree_positions is not None
        start, stop = self.tree.start.long(), self.tree.stop.long()
        # Index minus position, the same for all tokens of an interval; an empty interval may be the last of the row.
        some = start.clamp(max=self.key_length - 1)
        offset = some - self.tree_positions.gather(1, some.flatten(1)).view_as(some)
        start = torch.maximum(start, first[..., None] + offset)
        if last is not None:
            stop = torch.minimum(stop, last[..., None] + offset)
        return AttentionMask.from_intervals(start, stop, self.key_length)


class Rule:
    """One rule of a mask: which keys a query attends to."""

    def mask(self, tokens: Tokens) -> AttentionMask:
        raise NotImplementedError

    def parts(self) -> Iterator[Rule]:
        """Yield the rule itself, or the rules that it combines."""
        yield self

    def is_static(self) -> bool:
        """Return whether the rule is the same for all inputs."""
        return all(isinstance(part, Causal | Full | Window | Chunk) for part in self.parts())


@dataclass(frozen=True)
class Causal(Rule):
    def mask(self, tokens: Tokens) -> AttentionMask:
        return tokens.interval(None, tokens.index + 1)


@dataclass(frozen=True)
class Full(Rule):
    """All keys, as in encoders."""

    def mask(self, tokens: Tokens) -> AttentionMask:
        return tokens.interval(None, None)


@dataclass(frozen=True)
class Window(Rule):
    """Keys from `left` before the query to `right` after it; None is no limit."""

    left: int
    right: int | None

    def mask(self, tokens: Tokens) -> AttentionMask:
        if (positions := tokens.tree_positions) is not None:
            last = None if self.right is None else positions + self.right + 1
            return tokens.tree_interval(positions - self.left, last)
        last = None if self.right is None else tokens.index + self.right + 1
        return tokens.interval(tokens.index - self.left, last)


@dataclass(frozen=True)
class Chunk(Rule):
    """Keys in the query's chunk of its document.

    left_padding  int [B], tokens of padding before the document of each row
    """

    size: int
    left_padding: Tensor = field(compare=False, repr=False)

    def mask(self, tokens: Tokens) -> AttentionMask:
        if (positions := tokens.tree_positions) is not None:
            first = positions - positions % self.size
            return tokens.tree_interval(first, first + self.size)
        in_document = tokens.in_document
        if in_document is None:
            in_document = tokens.index - self.left_padding.cpu()[:, None]
        first = tokens.index - in_document % self.size
        return tokens.interval(first, first + self.size)


@dataclass(frozen=True, eq=False)
class Spans(Rule):
    """Keys of the query's span, such as the patches of an image: int [B, T or more], -1 in no span."""

    ids: Tensor

    def mask(self, tokens: Tokens) -> AttentionMask:
        ids = self.ids.cpu().to(torch.int64)
        keys = ids[:, tokens.key_offset : tokens.key_offset + tokens.key_length]
        return document(ids.gather(1, tokens.index), keys)


@dataclass(frozen=True, eq=False)
class Dense(Rule):
    """A mask given pair by pair: bool [B, Q, T]."""

    visible: Tensor

    def mask(self, tokens: Tokens) -> AttentionMask:
        return AttentionMask.from_dense(self.visible.cpu())


@dataclass(frozen=True, eq=False)
class Unknown(Rule):
    """A mask function that is not known, evaluated for every pair of indices, or of `positions` if given.

    positions  int64 [B, S], to which transformers maps the indices of packed rows
    """

    function: Callable[..., Any]
    positions: Tensor | None = None

    def mask(self, tokens: Tokens) -> AttentionMask:
        name = getattr(self.function, "__qualname__", repr(self.function))
        rows, queries = tokens.index.shape
        if tokens.key_length > MOST_TOKENS:
            raise ValueError(
                f"the mask function {name} is not known to sightline: it would be evaluated for each of {queries} x "
                f"{tokens.key_length} pairs, and the limit is {MOST_TOKENS} keys; pass attention_masks=... to the "
                "model, which sightline.hf.enable adds, or use attn_implementation='sdpa'"
            )
        _warn_once(name)
        first, positions = tokens.index[:, 0], self.positions

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            q, k = q + first[b], k + tokens.key_offset
            if positions is not None:
                q, k = positions[b, q], positions[b, k]
            return self.function(b, h, q, k)

        return AttentionMask.from_mask_mod(visible, rows, queries, tokens.key_length)


@dataclass(frozen=True)
class Combined(Rule):
    """Rules of which one mask is made."""

    rules: tuple[Rule, ...]

    def parts(self) -> Iterator[Rule]:
        for rule in self.rules:
            yield from rule.parts()


class All(Combined):
    """Intersection of rules."""

    def mask(self, tokens: Tokens) -> AttentionMask:
        return reduce(and_, (rule.mask(tokens) for rule in self.rules))


class Any_(Combined):
    """Union of rules."""

    def mask(self, tokens: Tokens) -> AttentionMask:
        return reduce(or_, (rule.mask(tokens) for rule in self.rules))


def layer_type(rule: Rule) -> str:
    """Return the layer type of a rule, as in `config.layer_types`: the name of its mask in `attention_masks`."""
    parts = list(rule.parts())
    if any(isinstance(part, Chunk) for part in parts):
        return "chunked_attention"
    return "sliding_attention" if any(isinstance(part, Window) for part in parts) else "full_attention"


@dataclass(frozen=True)
class Reading:
    """Result of `read_rule`.

    rule          the rule without its documents
    document_ids  int [B, S], the documents that transformers has inferred from `position_ids`; None if it found one
    """

    rule: Rule
    document_ids: Tensor | None


def read_rule(function: Callable[..., Any]) -> Reading:
    """Read the rule of a mask function that a builder of transformers has made."""
    found: list[Tensor] = []
    rule = _read(function, found, positions=None, required=True)
    return Reading(rule, found[0] if found else None)


def _read(function: Callable[..., Any], found: list[Tensor], positions: Tensor | None, required: bool) -> Rule:
    """Read one function; `found` receives document numbers, which must be `required`: part of no union."""
    match _factory(function):
        case "and_masks":
            rules = [_read(part, found, positions, required) for part in _cell(function, "mask_functions")]
            kept = tuple(rule for rule in rules if rule != Full()) or (Full(),)
            return kept[0] if len(kept) == 1 else All(kept)
        case "or_masks":
            return Any_(tuple(_read(part, found, positions, False) for part in _cell(function, "mask_functions")))
        case "causal_mask_function":
            return Causal()
        case "bidirectional_mask_function":
            return Full()
        case "sliding_window_overlay":
            return Window(int(_cell(function, "sliding_window")) - 1, None)
        case "sliding_window_bidirectional_overlay":
            window = int(_cell(function, "sliding_window"))
            return Window(window, window)
        case "chunked_overlay":
            return Chunk(int(_cell(function, "chunk_size")), _cell(function, "left_padding"))
        case "blockwise_overlay":
            return Spans(_cell(function, "block_sequence_ids"))
        case "packed_sequence_mask_function" if required:
            found.append(_cell(function, "packed_sequence_mask"))
            return Full()
        case "remap_positions_for_packed_sequence":
            # Windows are the same by position and by index within a document; chunks need the index in the document.
            # Spans are numbered by index: by position, as transformers reads them here, they would be those of the
            # row's first document.
            return _read(_cell(function, "mask_function"), found, _cell(function, "position_ids"), required)
    return Unknown(function, None if positions is None else positions.cpu())


def _factory(function: Callable[..., Any]) -> str:
    """Return the name of the function of `masking_utils` that made a mask function, or of the function itself."""
    if getattr(function, "__module__", None) != "transformers.masking_utils":
        return ""
    return function.__qualname__.split(".")[0]


def _cell(function: Callable[..., Any], name: str) -> Any:
    """Return a variable of a closure."""
    index = function.__code__.co_freevars.index(name)
    return function.__closure__[index].cell_contents  # type: ignore[index]


_WARNED: set[str] = set()


def _warn_once(name: str) -> None:
    if name not in _WARNED:
        _WARNED.add(name)
        logger.warning(
            "The mask function %s is not known to sightline: it is evaluated for every pair of tokens, which is exact "
            "but costs time and memory that grow with the square of the row.",
            name,
        )
