"""A batch of packed rows: tokens and the facts about them that the packer states once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

IGNORE = -100  # the label that carries no loss, as in torch.nn.functional.cross_entropy
PADDING = -1  # the document id of a padding token


@dataclass(frozen=True)
class ImageSizes:
    """How images stand in the rows of a model that sees them: what a loader has to know of the model."""

    patch_size: int
    """Pixels a side of a patch."""
    spatial_merge_size: int
    """Patches a side of the square that one image token stands for."""
    image_token_id: int
    """Id of the token that stands for images in the text."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B rows of S tokens, and where each document lies in them.

    tokens        int64 [B, S]
    labels        int64 [B, S], already shifted: the next token of the same document, -100 where there is none
    document_ids  int32 [B, S], number of the token's document in its row, counted from 0; -1 is padding
    positions     int32 [B, S], position inside the document, from 0. A document carried over from the row before
                  goes on counting, so chunks and prefixes keep meaning the same tokens; padding has 0.
    extra         whatever else the model's forward takes by name, each tensor with B first
    """

    tokens: Tensor
    labels: Tensor
    document_ids: Tensor
    positions: Tensor
    extra: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.tokens.shape
        if len(shape) != 2:
            raise ValueError(f"tokens must be [B, S], got shape {tuple(shape)}")
        for name in ("labels", "document_ids", "positions"):
            if getattr(self, name).shape != shape:
                came = tuple(getattr(self, name).shape)
                raise ValueError(f"{name} must have the shape of tokens {tuple(shape)}, got {came}")

    @classmethod
    def from_documents(cls, documents: Iterable[Sequence[int]], length: int, *, pad_token: int = 0) -> Batch:
        """Pack lists of token ids into rows of `length`, in order and without a gap.

        A document that does not fit is carried over into the next row; the last row is padded. The label of a row's
        last token is still its document's next token, so nothing is lost where a row ends.

        Errors: ValueError for a row shorter than 2, for an empty document and for no document at all.
        """
        if length < 2:
            raise ValueError(f"a row must hold at least 2 tokens (one to see, one to predict), got length={length}")
        rows = [RowBuilder(length)]
        for number, document in enumerate(documents):
            if len(document) == 0:
                raise ValueError(f"document {number} is empty: a document has at least one token; leave it out")
            at = 0
            while at < len(document):
                if rows[-1].room == 0:
                    rows.append(RowBuilder(length))
                at = rows[-1].add(document, at)
        if not rows[0].tokens:
            raise ValueError("no documents to pack: give at least one list of token ids")
        return cls.from_rows([row.finish(pad_token) for row in rows])

    @classmethod
    def from_rows(cls, rows: Sequence[Row]) -> Batch:
        """Stack finished rows into a batch."""
        tokens, labels, document_ids, positions = zip(*rows, strict=True)
        return cls(
            tokens=torch.tensor(tokens, dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.int64),
            document_ids=torch.tensor(document_ids, dtype=torch.int32),
            positions=torch.tensor(positions, dtype=torch.int32),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        return self.tokens.shape[0], self.tokens.shape[1]

    def valid_tokens(self) -> int:
        """Number of tokens with a label: what a mean loss divides by."""
        return int((self.labels != IGNORE).sum())

    def fill(self) -> float:
        """Share of the rows that is no padding, from 0 to 1."""
        return float((self.document_ids != PADDING).float().mean())

    def document_offsets(self) -> Tensor:
        """Where each document begins in the flattened batch: int32 [N + 1], from 0 to B * S.

        This is what a layer with a memory needs to forget at the right places: a convolution or a recurrence over
        `tokens.flatten()` starts anew at every offset (`cu_seqlens` of causal-conv1d and of flash-linear-attention).
        A row always starts a new segment; a run of padding is a segment of its own.
        """
        ids = self.document_ids
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = first.flatten().nonzero().flatten()
        return torch.cat([starts, starts.new_tensor([ids.numel()])]).to(torch.int32)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        """The batch of some rows, for microbatches."""
        return self._map(lambda t: t[rows])

    def _map(self, fn) -> Batch:
        return Batch(
            tokens=fn(self.tokens),
            labels=fn(self.labels),
            document_ids=fn(self.document_ids),
            positions=fn(self.positions),
            extra={name: fn(value) for name, value in self.extra.items()},
        )


Row = tuple[list[int], list[int], list[int], list[int]]
"""tokens, labels, document_ids, positions of one row."""


class RowBuilder:
    """One row while it is being filled; the packers of `sightline.data` and `Batch.from_documents` share it."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.tokens: list[int] = []
        self.labels: list[int] = []
        self.document_ids: list[int] = []
        self.positions: list[int] = []

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.length - len(self.tokens)

    def add(self, document: Sequence[int], at: int = 0) -> int:
        """Add document[at:] as far as it fits, as a new document of this row. Returns where the rest begins."""
        end = min(len(document), at + self.room)
        number = self.document_ids[-1] + 1 if self.document_ids else 0
        self.tokens += document[at:end]
        self.labels += document[at + 1 : end + 1]
        if end == len(document):
            self.labels.append(IGNORE)
        self.document_ids += [number] * (end - at)
        self.positions += range(at, end)
        return end

    def finish(self, pad_token: int) -> Row:
        """The row at its full length, padded where it is not full."""
        pad = self.room
        return (
            self.tokens + [pad_token] * pad,
            self.labels + [IGNORE] * pad,
            self.document_ids + [PADDING] * pad,
            self.positions + [0] * pad,
        )
