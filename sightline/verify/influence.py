"""Influence between tokens that attention masks allow over all layers, and the trials that test what they forbid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

import torch
from torch import Tensor

from sightline.masks import AttentionMask

Masks = AttentionMask | Mapping[str, AttentionMask] | Sequence[AttentionMask]
"""One mask or {name: mask}, which any number of layers may use in any order; or the masks of the layers in order."""


@dataclass(frozen=True)
class Trial:
    """Outputs, none of which may depend on any of the hidden inputs.

    outputs, hidden  bool [B, S], on the CPU
    """

    outputs: Tensor
    hidden: Tensor


class Influence:
    """The tokens that may influence each token: those it attends to, those that they attend to, and so on.

    A token influences itself, because of the residual stream. O(S K) for each layer and set of tokens.
    """

    def __init__(self, masks: Masks) -> None:
        layers = list(masks.values()) if isinstance(masks, Mapping) else masks
        self.any_depth = isinstance(masks, AttentionMask | Mapping)
        self.layers = [layers] if isinstance(layers, AttentionMask) else list(layers)
        if not self.layers or not all(isinstance(mask, AttentionMask) for mask in self.layers):
            raise ValueError(f"expected an AttentionMask, a dict or a list of them, got {masks!r:.200}")
        self.layers = [mask.cpu() for mask in self.layers]
        self.union = reduce(or_, self.layers)
        if self.union.shape[1] != self.union.shape[2]:
            raise ValueError(f"expected masks of S queries and the same S keys, got {self.union}; test without a cache")
        if self.any_depth:
            self.layers = [self.union]

    def sources(self, tokens: Tensor) -> Tensor:
        """Return the tokens that may influence any of these tokens, bool [B, S] each."""
        for mask in reversed(self.layers):
            tokens = tokens | attended_keys(mask, tokens)
        while self.any_depth and not torch.equal(more := tokens | attended_keys(self.union, tokens), tokens):
            tokens = more
        return tokens


def attended_keys(mask: AttentionMask, queries: Tensor) -> Tensor:
    """Return the keys bool [B, T] that any of the queries bool [B, Q] attends to."""
    count = queries.to(torch.int32)[..., None].expand(mask.start.shape).flatten(1)
    change = torch.zeros(mask.shape[0], mask.key_length + 1, dtype=torch.int32)
    change.scatter_add_(1, mask.start.long().flatten(1), count)
    change.scatter_add_(1, mask.stop.long().flatten(1), -count)
    return change[:, :-1].cumsum(dim=1) > 0


def number_documents(mask: AttentionMask) -> Tensor:
    """Return the document of each token, int64 [B, S]: numbers of the sets of tokens that no interval connects.

    Keys of one interval are joined to runs; then each run takes the lowest number of the runs that its queries attend
    to, until no number changes.
    """
    rows, length, _ = mask.shape
    used = mask.stop > mask.start
    change = torch.zeros(rows, length + 1, dtype=torch.int64)
    change.scatter_add_(1, mask.start.long().flatten(1), used.long().flatten(1))
    change.scatter_add_(1, (mask.stop.long() - 1).clamp(min=0).flatten(1), -used.long().flatten(1))
    with_previous = torch.zeros(rows, length, dtype=torch.bool)
    with_previous[:, 1:] = change[:, : length - 1].cumsum(dim=1) > 0
    run = (~with_previous).cumsum(dim=1) - 1
    query_run = run[..., None].expand(mask.start.shape).flatten(1)
    key_run = run.gather(1, mask.start.long().flatten(1)).where(used.flatten(1), query_run)
    number = torch.arange(length).repeat(rows, 1)
    while True:
        lowest = torch.minimum(number.gather(1, query_run), number.gather(1, key_run))
        joined = number.scatter_reduce(1, query_run, lowest, "amin").scatter_reduce(1, key_run, lowest, "amin")
        if torch.equal(joined, number):
            break
        number = joined
    return number.gather(1, run) + torch.arange(rows)[:, None] * length


def plan_trials(influence: Influence, tokens_per_document: int | None) -> tuple[list[Trial], int]:
    """Return the trials and the number of documents.

    The first trials test every ordered pair of documents, also of different rows: N documents need 2 log2(N) trials,
    because the numbers of two documents differ in at least one bit. The others have one output token in each document
    and test what is hidden from it inside of its document: later tokens, tokens outside of its window.

    tokens_per_document  output tokens of the second kind in each document; None: all tokens
    """
    visible = influence.union.visible_queries()  # outputs of padding mean nothing; as inputs they are hidden
    numbers = number_documents(influence.union)
    document = torch.full_like(numbers, -1)
    document[visible] = numbers[visible].unique(return_inverse=True)[1]
    count = int(document.max()) + 1
    trials = []
    for bit in range(max(1, (count - 1).bit_length())):
        for value in (1, 0):
            outputs = visible & ((document >> bit & 1) == value)
            hidden = ~influence.sources(outputs)
            if outputs.any() and hidden.any():
                trials.append(Trial(outputs, hidden))
    sizes = torch.bincount(document[visible], minlength=count)
    order = document.flatten().argsort(stable=True)[-int(sizes.sum()) :] if count else document.new_zeros(0)
    first = sizes.cumsum(0) - sizes
    rounds = tokens_per_document if tokens_per_document is not None else int(sizes.max()) if count else 0
    for number in range(rounds):
        offset = sizes * (2 * number + 1) // (2 * rounds) if tokens_per_document is not None else number
        outputs = torch.zeros_like(visible)
        outputs.view(-1)[order[first + torch.as_tensor(offset).minimum(sizes - 1)]] = True
        hidden = ~influence.sources(outputs)
        if bool((hidden & torch.isin(numbers, numbers[outputs])).any()):
            trials.append(Trial(outputs, hidden))
    return trials, count
