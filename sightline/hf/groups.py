"""Groups of responses in packed rows that hold each shared prompt once: rollouts, preference pairs, trees of dialogues.

Sequences that begin with the same tokens share them: these tokens are one document, and what follows in each sequence
is a document that continues it. The last of the shared tokens is repeated in each continuation, so that every token has
a single next token, and its logits predict one token of the responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from sightline.batch import IGNORE

SHORTEST_SHARED = 16
"""Shared tokens that are worth a document of their own."""

Tokens = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class GroupedRows:
    """N responses and their prompts in B rows of S tokens.

    input_ids     int64 [B, S]; padding is 0
    position_ids  int64 [B, S], positions in the sequence of prompt and response
    document_ids  int32 [B, S]; -1: padding
    prefix_ids    int32 [B, S], the document that each token's document continues; its own id if none
    labels        int64 [B, S], the next token where it belongs to a response, else -100
    index         int64 [N, C], the token of the flattened rows [B * S] that predicts each token of each response; -1
                  where a response is shorter than the longest one, C
    """

    input_ids: Tensor
    position_ids: Tensor
    document_ids: Tensor
    prefix_ids: Tensor
    labels: Tensor
    index: Tensor

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the keyword arguments of an enabled model. Document numbers stay on the CPU, where masks are built."""
        return {
            "input_ids": self.input_ids.to(device),
            "position_ids": self.position_ids.to(device),
            "document_ids": self.document_ids,
            "prefix_ids": self.prefix_ids,
        }

    def gather(self, values: Tensor) -> Tensor:
        """Return the values of the tokens that predict the responses, [B, S] to [N, C]; 0 where there is none."""
        index = self.index.to(values.device)
        return values.flatten()[index.clamp(min=0)].masked_fill(index < 0, 0)


def pack_groups(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    max_length: int | None = None,
    shortest_shared: int = SHORTEST_SHARED,
) -> GroupedRows:
    """Return rows for `model(**rows.inputs())` in which tokens that several sequences begin with are computed once.

    The tokens are compared, so no group has to be named, and responses may share their beginnings as well: trees of any
    depth. Equal sequences are computed once. All results are those of each prompt and response alone.

    prompts          the prompt of each response, at least one token; a group repeats its prompt
    responses        tokens of each response; it may be empty
    max_length       longest row; a group that is longer takes several rows, each with its prompt. None: one row
    shortest_shared  shared tokens that are worth a document of their own

    Raises:
        ValueError: if a prompt is empty, a sequence is longer than max_length, or the arguments do not fit together.
    """
    if len(prompts) != len(responses) or not prompts:
        raise ValueError(
            f"pack_groups needs one prompt for each response, got {len(prompts)} prompts and {len(responses)} "
            "responses; repeat the prompt of a group"
        )
    empty = next((i for i, prompt in enumerate(prompts) if len(prompt) == 0), None)
    if empty is not None:
        raise ValueError(
            f"pack_groups: prompt {empty} is empty, so nothing predicts the first token of its response; begin it with "
            "the tokenizer's bos token"
        )
    sequences = [(*map(int, prompt), *map(int, response)) for prompt, response in zip(prompts, responses, strict=True)]
    rows, places = pack_sequences(sequences, max_length, shortest_shared)
    index = torch.full((len(responses), max(map(len, responses))), -1, dtype=torch.int64)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        index[i, : len(response)] = places[i][len(prompt) - 1 : -1]
    return build_rows(rows, index, [token for response in responses for token in response])


class Document(NamedTuple):
    """Tokens of one document, the position of the first, and the document of the row that it continues; -1: none."""

    tokens: Tokens
    position: int
    parent: int


@dataclass(frozen=True)
class Tree:
    """Documents of sequences that begin alike, parents first.

    places  the tokens of each sequence: indices in the concatenated documents
    """

    documents: list[Document]
    places: dict[Tokens, list[int]]

    @property
    def size(self) -> int:
        return sum(len(document.tokens) for document in self.documents)


def pack_sequences(
    sequences: Sequence[Tokens], max_length: int | None, shortest_shared: int
) -> tuple[list[list[Document]], list[Tensor]]:
    """Return the documents of each row, and where the tokens of each sequence are: int64 indices of flattened rows."""
    longest = max(map(len, sequences))
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"a prompt with its response has {longest} tokens, more than the longest row, {max_length}; raise "
            "max_length or drop the response"
        )
    if shortest_shared < 1:
        raise ValueError(f"shortest_shared is a number of tokens, at least 1, got {shortest_shared}")
    trees = _build_trees(sorted(set(sequences)), max_length, shortest_shared)
    rows = _first_fit(trees, max_length)
    width = max(sum(tree.size for tree in row) for row in rows)
    packed: list[list[Document]] = []
    places: dict[Tokens, Tensor] = {}
    for number, row in enumerate(rows):
        documents: list[Document] = []
        start = number * width
        for tree in row:
            places |= {tokens: torch.tensor(at, dtype=torch.int64) + start for tokens, at in tree.places.items()}
            shift = len(documents)
            documents += [d._replace(parent=d.parent + shift) if d.parent >= 0 else d for d in tree.documents]
            start += tree.size
        packed.append(documents)
    return packed, [places[tokens] for tokens in sequences]


def build_rows(rows: list[list[Document]], index: Tensor, targets: Sequence[int]) -> GroupedRows:
    """Return the tensors of packed documents.

    index    int64 [N, C], as in GroupedRows
    targets  the tokens that are predicted, one for each place of `index` that is not -1, row by row
    """
    shape = len(rows), max(sum(len(d.tokens) for d in row) for row in rows)
    input_ids, position_ids = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    labels = torch.full(shape, IGNORE)
    document_ids, prefix_ids = (torch.full(shape, -1, dtype=torch.int32) for _ in range(2))
    for row, documents in enumerate(rows):
        start = 0
        for number, document in enumerate(documents):
            here = row, slice(start, start + len(document.tokens))
            input_ids[here] = torch.tensor(document.tokens)
            position_ids[here] = document.position + torch.arange(len(document.tokens))
            document_ids[here] = number
            prefix_ids[here] = document.parent if document.parent >= 0 else number
            start += len(document.tokens)
    labels.view(-1)[index[index >= 0]] = torch.tensor(targets, dtype=torch.int64)
    return GroupedRows(input_ids, position_ids, document_ids, prefix_ids, labels, index)


def _build_trees(sequences: list[Tokens], max_length: int | None, shortest_shared: int) -> list[Tree]:
    """Return the trees of sorted, distinct sequences, none longer than a row."""
    shared = [_common_length(a, b) for a, b in pairwise(sequences)]
    runs = _runs(shared, 0, len(sequences), shortest_shared)
    trees = []
    while runs:
        first, last = runs.pop()
        tree = _build_tree(sequences[first:last], shared[first : last - 1], shortest_shared)
        if max_length is None or tree.size <= max_length:
            trees.append(tree)
        else:  # the prompt is computed once in each half
            middle = (first + last) // 2
            runs += [(first, middle), (middle, last)]
    return trees


def _build_tree(sequences: list[Tokens], shared: list[int], shortest_shared: int) -> Tree:
    """Return the tree of sorted, distinct sequences that begin alike.

    shared  how many tokens each sequence has in common with the next
    """
    documents: list[Document] = []
    places: list[list[int]] = [[] for _ in sequences]
    size = 0
    pending = [(0, len(sequences), 0, -1)]  # a range of sequences, their tokens in documents so far, the last of these
    while pending:
        first, last, position, parent = pending.pop()
        # A common beginning ends one token early, since its last token predicts different tokens.
        stop = min(shared[first : last - 1]) - 1 if last - first > 1 else len(sequences[first])
        number = len(documents)
        documents.append(Document(sequences[first][position:stop], position, parent))
        for place in places[first:last]:
            place.extend(range(size, size + stop - position))
        size += stop - position
        if last - first > 1:
            runs = _runs(shared[first : last - 1], first, last, stop + shortest_shared)
            pending += [(*run, stop, number) for run in reversed(runs)]
    return Tree(documents, dict(zip(sequences, places, strict=True)))


def _runs(shared: list[int], first: int, last: int, least: int) -> list[tuple[int, int]]:
    """Divide the sequences [first, last) where neighbors have at most `least` tokens in common."""
    bounds = [first, *(first + i + 1 for i, common in enumerate(shared) if common <= least), last]
    return list(pairwise(bounds))


def _common_length(a: Tokens, b: Tokens) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _first_fit(trees: list[Tree], max_length: int | None) -> list[list[Tree]]:
    """Return the trees of each row: the largest first, each in the first row with room for it."""
    if max_length is None:
        return [trees]
    rows: list[list[Tree]] = []
    room: list[int] = []
    for tree in sorted(trees, key=lambda tree: -tree.size):
        row = next((i for i, free in enumerate(room) if free >= tree.size), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_length)
        rows[row].append(tree)
        room[row] -= tree.size
    return rows
