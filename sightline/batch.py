"""A batch of packed rows: tokens, and the labels, document ids and positions that the packer sets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

IGNORE = -100  # label of tokens without a loss, as in torch.nn.functional.cross_entropy
PADDING = -1  # document id of padding tokens


@dataclass(frozen=True)
class ImageSizes:
    """Properties of a vision-language model that a loader needs to place images into rows."""

    patch_size: int
    """Side of a patch in pixels."""
    spatial_merge_size: int
    """Side of the square of patches that one image token represents, in patches."""
    image_token_id: int
    """Id of the placeholder token for images."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B packed rows of S tokens, with the documents in each row.

    tokens        int64 [B, S]
    labels        int64 [B, S], already shifted: the next token of the same document, -100 if there is none
    document_ids  int32 [B, S], index of the token's document in its row, from 0; -1 for padding
    positions     int32 [B, S], position in the document, from 0. A document continued from an earlier row continues
                  its positions, so that chunks and prefixes contain the same tokens as without the split; padding has 0
    extra         further keyword arguments of the model's forward: tensors whose first dim is B
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
                actual = tuple(getattr(self, name).shape)
                raise ValueError(f"{name} must have the shape of tokens {tuple(shape)}, got {actual}")

    @classmethod
    def from_documents(cls, documents: Iterable[Sequence[int]], length: int, *, pad_token: int = 0) -> Batch:
        """Pack lists of token ids into rows of `length`, in order and without gaps.

        A document that does not fit into a row continues in the next one; only the last row is padded. The label of a
        row's last token is the next token of its document, so row boundaries lose no labels.

        Raises:
            ValueError: if `length` is less than 2, a document is empty, or there are no documents.
        """
        if length < 2:
            raise ValueError(f"length must be at least 2 tokens (one input token, one label), got length={length}")
        rows = [RowBuilder(length)]
        for index, document in enumerate(documents):
            if len(document) == 0:
                raise ValueError(f"document {index} is empty; expected at least one token; remove empty documents")
            start = 0
            while start < len(document):
                if rows[-1].free == 0:
                    rows.append(RowBuilder(length))
                start = rows[-1].add(document, start)
        if not rows[0].tokens:
            raise ValueError("got no documents to pack; expected at least one list of token ids")
        return cls.from_rows([row.finish(pad_token) for row in rows])

    @classmethod
    def from_rows(cls, rows: Sequence[Row]) -> Batch:
        """Stack rows into a batch."""
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
        """Return the number of tokens with a label, by which a mean loss is divided."""
        return int((self.labels != IGNORE).sum())

    def fill(self) -> float:
        """Return the fraction of tokens that are not padding, from 0 to 1."""
        return float((self.document_ids != PADDING).float().mean())

    def document_offsets(self) -> Tensor:
        """Return the start of each document in the flattened batch: int32 [N + 1], from 0 to B * S.

        Recurrent layers reset their state at these offsets: they are the `cu_seqlens` of causal-conv1d and
        flash-linear-attention for `tokens.flatten()`. Each row starts a new segment, and so does its padding.
        """
        ids = self.document_ids
        first = torch.ones_like(ids, dtype=torch.bool)
        first[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = first.flatten().nonzero().flatten()
        return torch.cat([starts, starts.new_tensor([ids.numel()])]).to(torch.int32)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on this device."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        """Return the batch of some of the rows, for micro-batches."""
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
"""tokens, labels, document_ids and positions of one row."""


class RowBuilder:
    """A row that is being filled, by the packers of `sightline.data` or `Batch.from_documents`."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.tokens: list[int] = []
        self.labels: list[int] = []
        self.document_ids: list[int] = []
        self.positions: list[int] = []

    @property
    def free(self) -> int:
        """Number of tokens that still fit."""
        return self.length - len(self.tokens)

    def add(self, document: Sequence[int], start: int = 0) -> int:
        """Append the part of document[start:] that fits, as a new document of this row, and return the part's end."""
        end = min(len(document), start + self.free)
        document_id = self.document_ids[-1] + 1 if self.document_ids else 0
        self.tokens += document[start:end]
        self.labels += document[start + 1 : end + 1]
        if end == len(document):
            self.labels.append(IGNORE)
        self.document_ids += [document_id] * (end - start)
        self.positions += range(start, end)
        return end

    def finish(self, pad_token: int) -> Row:
        """Return the row, padded to its full length."""
        pad = self.free
        return (
            self.tokens + [pad_token] * pad,
            self.labels + [IGNORE] * pad,
            self.document_ids + [PADDING] * pad,
            self.positions + [0] * pad,
        )
