"""Random packed rows and random expressions of rules for hypothesis, each with the dense truth written independently.

The truth of a rule is a comparison of plain facts over all pairs, never an interval.
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
    """Packed rows: document_ids, positions, prefix_lengths, span_ids, prefix_ids [B, S] and is_global bool [B, S]."""

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
    """Rows of documents of 1 token and more, with padding at the end of some and with rows that are all padding."""
    length = draw(st.integers(1, max_length))
    facts: list[list[list[int]]] = []
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
        facts.append(row)
    columns = [torch.tensor(column, dtype=torch.int32) for column in zip(*facts, strict=True)]
    return Rows(*columns[:5], is_global=columns[5].bool())


def pairs(fact: Tensor) -> tuple[Tensor, Tensor]:
    """A fact of the query [B, S, 1] and of the key [B, 1, S]."""
    return fact[:, :, None], fact[:, None, :]


def dense_rules(rows: Rows, window: int, chunk: int) -> dict[str, tuple[AttentionMask, Tensor]]:
    """Every rule over these rows: (mask, bool [B, S, S])."""
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
    """A random expression of rules joined by & and |, and its dense truth."""
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
    """Sorted, apart from each other, empty ones as [0, 0) at the end, and K as small as the mask allows."""
    start, stop = mask.start.long(), mask.stop.long()
    seen = stop > start
    assert torch.equal(start[~seen], torch.zeros_like(start[~seen]))
    assert torch.equal(stop[~seen], torch.zeros_like(stop[~seen]))
    assert not (seen[..., 1:] & ~seen[..., :-1]).any(), "an empty interval before a full one"
    assert (start[..., 1:] > stop[..., :-1])[seen[..., 1:]].all(), "intervals touch or are out of order"
    assert (start >= 0).all() and (stop <= mask.key_length).all()
    assert mask.intervals == 1 or seen[..., -1].any(), "K is larger than any query needs"


@st.composite
def scattered_masks(draw: st.DrawFn, longest: int = 40, square: bool = False) -> AttentionMask:
    """Any mask of up to 3 intervals a query, with empty queries, rows of different content, Q and T apart."""
    rows, queries, width = (draw(st.integers(1, most)) for most in (2, longest, 3))
    keys = queries if square else draw(st.integers(1, longest))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    start = torch.randint(0, keys + 1, (rows, queries, width), generator=numbers)
    length = torch.randint(0, draw(st.integers(1, keys)) + 1, start.shape, generator=numbers)
    seen = torch.rand(start.shape, generator=numbers) < draw(st.sampled_from([0.3, 0.9]))
    return AttentionMask.from_intervals(start, start + length * seen, keys)


def documents(*lengths: int, padding: int = 0) -> torch.Tensor:
    ids = [number for number, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor([ids + [-1] * padding])


def packed(*lengths: int, padding: int = 0) -> AttentionMask:
    return causal(1, sum(lengths) + padding) & document(documents(*lengths, padding=padding))
