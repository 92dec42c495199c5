"""Hypothesis strategies for packed rows and mask expressions, with an independent dense mask as reference.

The dense mask of a rule compares token attributes over all pairs; it does not use intervals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from sightline.masks import (
    AttentionMask,
    bidirectional,
    causal,
    chunked,
    document,
    global_tokens,
    prefix_lm,
    shared_prefix,
    sliding_window,
)


@dataclass(frozen=True)
class Rows:
    """Token attributes of packed rows, [B, S] each: integers, and `is_global` bool."""

    document_ids: Tensor
    positions: Tensor
    prefix_lengths: Tensor
    span_ids: Tensor
    prefix_ids: Tensor
    is_global: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.document_ids.shape[0], self.document_ids.shape[1]


@st.composite
def packed_rows(draw: st.DrawFn, max_rows: int = 3, max_length: int = 40) -> Rows:
    """Rows of documents of at least 1 token; some rows end with padding, some are all padding."""
    length = draw(st.integers(1, max_length))
    attributes: list[list[list[int]]] = []
    for _ in range(draw(st.integers(1, max_rows))):
        lengths = draw(st.lists(st.integers(1, max(1, length // 2)), max_size=length))
        row: list[list[int]] = [[], [], [], [], [], []]
        for number, size in enumerate(lengths):
            size = min(size, length - len(row[0]))
            prefix = draw(st.integers(0, size + 2))
            prompt = draw(st.integers(0, number))
            for position in range(size):
                span = draw(st.integers(-1, 2)) if position % 3 == 0 else row[3][-1]
                values = (number, position, prefix, span, prompt, int(draw(st.integers(0, 9)) == 0))
                for column, value in zip(row, values, strict=True):
                    column.append(value)
        for column, value in zip(row, (-1, 0, 0, -1, -1, 0), strict=True):
            column += [value] * (length - len(column))
        attributes.append(row)
    columns = [torch.tensor(column, dtype=torch.int32) for column in zip(*attributes, strict=True)]
    return Rows(*columns[:5], is_global=columns[5].bool())


def pairs(attribute: Tensor) -> tuple[Tensor, Tensor]:
    """Broadcast a token attribute to pairs: of the query [B, S, 1] and of the key [B, 1, S]."""
    return attribute[:, :, None], attribute[:, None, :]


def dense_rules(rows: Rows, window: int, chunk: int) -> dict[str, tuple[AttentionMask, Tensor]]:
    """All rules applied to these rows: (mask, reference bool [B, S, S]) by name."""
    batch, length = rows.shape
    index = torch.arange(length).expand(batch, length)
    q, kv = pairs(index)
    doc_q, doc_kv = pairs(rows.document_ids)
    pos_q, pos_kv = pairs(rows.positions)
    _, prefix_kv = pairs(rows.prefix_lengths)
    span_q, span_kv = pairs(rows.span_ids)
    prompt_q, _ = pairs(rows.prefix_ids)
    glob_q, glob_kv = pairs(rows.is_global)
    same = (doc_q == doc_kv) & (doc_q >= 0)
    return {
        "causal": (causal(batch, length), (kv <= q).expand(batch, -1, -1)),
        "document": (document(rows.document_ids), same),
        "window": (sliding_window(batch, length, window), ((kv <= q) & (kv > q - window)).expand(batch, -1, -1)),
        "two-sided window": (
            sliding_window(batch, length, left=window, right=chunk),
            ((kv >= q - window) & (kv <= q + chunk)).expand(batch, -1, -1),
        ),
        "window by position": (
            sliding_window(batch, length, window, positions=rows.positions),
            (pos_kv <= pos_q) & (pos_kv > pos_q - window),
        ),
        "chunk": (
            chunked(rows.positions, chunk) & document(rows.document_ids),
            same & (pos_q // chunk == pos_kv // chunk),
        ),
        "prefix": (
            (prefix_lm(rows.positions, rows.prefix_lengths) | causal(batch, length)) & document(rows.document_ids),
            same & ((pos_kv < prefix_kv) | (kv <= q)),
        ),
        "spans": (bidirectional(rows.span_ids), (span_q == span_kv) & (span_q >= 0)),
        "global": (global_tokens(rows.is_global), glob_q | glob_kv),
        "shared": (
            shared_prefix(rows.document_ids, rows.prefix_ids),
            same | ((prompt_q == doc_kv) & (doc_q >= 0) & (doc_kv >= 0)),
        ),
    }


@st.composite
def expressions(draw: st.DrawFn, max_rows: int = 3, max_length: int = 40) -> tuple[AttentionMask, Tensor]:
    """A random expression of rules combined with & and |, and its dense mask."""
    rows = draw(packed_rows(max_rows, max_length))
    rules = dense_rules(rows, draw(st.integers(1, 12)), draw(st.integers(1, 12)))
    mask, dense = rules[draw(st.sampled_from(sorted(rules)))]
    for _ in range(draw(st.integers(0, 4))):
        other, other_dense = rules[draw(st.sampled_from(sorted(rules)))]
        if draw(st.booleans()):
            mask, dense = mask & other, dense & other_dense
        else:
            mask, dense = mask | other, dense | other_dense
    return mask, dense


def assert_canonical(mask: AttentionMask) -> None:
    """Intervals are sorted and neither overlap nor are adjacent, unused ones are [0, 0) at the end, K is minimal."""
    start, stop = mask.start.long(), mask.stop.long()
    nonempty = stop > start
    assert torch.equal(start[~nonempty], torch.zeros_like(start[~nonempty]))
    assert torch.equal(stop[~nonempty], torch.zeros_like(stop[~nonempty]))
    assert not (nonempty[..., 1:] & ~nonempty[..., :-1]).any(), "an empty interval precedes a nonempty one"
    assert (start[..., 1:] > stop[..., :-1])[nonempty[..., 1:]].all(), "intervals are adjacent or out of order"
    assert (start >= 0).all() and (stop <= mask.key_length).all()
    assert mask.intervals == 1 or nonempty[..., -1].any(), "K is larger than any query needs"


@st.composite
def scattered_masks(draw: st.DrawFn, longest: int = 40, square: bool = False) -> AttentionMask:
    """Random masks of up to 3 intervals per query, with fully masked queries; Q and T differ unless `square`."""
    rows, queries, width = (draw(st.integers(1, most)) for most in (2, longest, 3))
    keys = queries if square else draw(st.integers(1, longest))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    start = torch.randint(0, keys + 1, (rows, queries, width), generator=numbers)
    length = torch.randint(0, draw(st.integers(1, keys)) + 1, start.shape, generator=numbers)
    nonempty = torch.rand(start.shape, generator=numbers) < draw(st.sampled_from([0.3, 0.9]))
    return AttentionMask.from_intervals(start, start + length * nonempty, keys)


def documents(*lengths: int, padding: int = 0) -> torch.Tensor:
    ids = [number for number, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor([ids + [-1] * padding])


def packed(*lengths: int, padding: int = 0) -> AttentionMask:
    return causal(1, sum(lengths) + padding) & document(documents(*lengths, padding=padding))
