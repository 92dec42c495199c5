"""Documents as rows of their own, for layers that carry a state along a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sightline.hf.documents import Documents

MOST_PADDING = 1.5
"""Rows of one group differ in length by at most this factor: little padding, and few groups."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Documents as rows, in groups of similar length.

    tokens  for each group, int64 [N, L], the tokens of each row as indices into the B * S tokens of the forward. Rows
            are padded on the right with their first token
    kept    for each group, int64 [K], the outputs to keep, as indices into its N * L
    places  int64 [B * S], for each token of the forward, its place in the kept outputs of all groups; that of padding
            is after them
    """

    tokens: list[Tensor]
    kept: list[Tensor]
    places: Tensor

    def compute(self, function: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> Tensor:
        """Return the outputs [B, S, W] of a function that maps the tokens of a group to outputs [N, L, W].

        The outputs of padding are 0.
        """
        outputs = [
            function(tokens).flatten(0, 1).index_select(0, kept)
            for tokens, kept in zip(self.tokens, self.kept, strict=True)
        ]
        padding = outputs[0].new_zeros(1, outputs[0].shape[1])
        return torch.cat([*outputs, padding]).index_select(0, self.places).view(*shape, -1)


def take(x: Tensor, tokens: Tensor) -> Tensor:
    """x [B, S, ...], tokens [N, L] -> [N, L, ...]."""
    return x.flatten(0, 1).index_select(0, tokens.flatten()).unflatten(0, tokens.shape)


def rows_of(documents: Documents, device: torch.device) -> Rows:
    """Return documents as rows, the same object for all layers of a forward.

    A document that continues others has their tokens before its own.
    """
    key = ("rows", device)
    if key not in documents.prepared:
        documents.prepared[key] = _build_rows(documents, device)
    return documents.prepared[key]


def _build_rows(documents: Documents, device: torch.device) -> Rows:
    sequences = sorted(_sequences(documents), key=lambda sequence: len(sequence[0]), reverse=True)
    groups: list[list[tuple[Tensor, int]]] = []
    for sequence in sequences:
        if not groups or len(groups[-1][0][0]) > MOST_PADDING * len(sequence[0]):
            groups.append([])
        groups[-1].append(sequence)
    padded, kept = [], []
    for group in groups:
        tokens = pad_sequence([tokens for tokens, _ in group], batch_first=True, padding_value=-1)
        length = torch.tensor([len(tokens) for tokens, _ in group])[:, None]
        own = torch.tensor([own for _, own in group])[:, None]
        index = torch.arange(tokens.shape[1])
        kept.append(((index < length) & (index >= length - own)).flatten().nonzero()[:, 0])
        padded.append(torch.where(tokens >= 0, tokens, tokens[:, :1]))
    order = torch.cat([tokens.flatten()[index] for tokens, index in zip(padded, kept, strict=True)])
    places = torch.full((documents.ids.numel(),), len(order))
    places[order] = torch.arange(len(order))
    return Rows([_send(x, device) for x in padded], [_send(x, device) for x in kept], _send(places, device))


def _sequences(documents: Documents) -> Iterator[tuple[Tensor, int]]:
    """Yield the tokens of each document, as indices into all rows, and how many of them are its own: the last ones.

    The others are those that it continues, which its mask tells.
    """
    ids, mask = documents.ids, documents.mask
    length = ids.shape[1]
    first = F.pad(ids.diff(dim=1) != 0, (1, 0), value=True).flatten().nonzero()[:, 0]
    ends = [*first[1:].tolist(), ids.numel()]
    starts, stops = (x.flatten(0, 1)[first].tolist() for x in (mask.start, mask.stop))
    for begin, end, *intervals in zip(first.tolist(), ends, starts, stops, strict=True):
        row = begin - begin % length
        spans = sorted((row + a, min(row + b, end)) for a, b in zip(*intervals, strict=True))
        tokens = [torch.arange(a, b) for a, b in spans if a < b]
        if tokens:  # padding attends to nothing
            yield torch.cat(tokens), end - begin


def _send(index: Tensor, device: torch.device) -> Tensor:
    return index if device.type == "cpu" else index.to(device, non_blocking=True)
