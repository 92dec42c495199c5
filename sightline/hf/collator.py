"""Collator of packed batches: it states where each document lies, on the CPU, so no forward has to find it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sightline.batch import IGNORE, PADDING

LOSS_MASKS = ("completion_mask", "assistant_masks")  # columns of TRL: 0 for a token without loss
COLUMNS = {"input_ids", "labels", "attention_mask", "seq_lengths", *LOSS_MASKS}


class Document(NamedTuple):
    """Tokens and labels of one document, int64 [n] each; labels[0] is -100, labels[i] the token i or -100."""

    tokens: Tensor
    labels: Tensor


@dataclass(frozen=True)
class PackedCollator:
    """Pack examples into rows: the data collator of a trainer, or the `collate_fn` of a DataLoader.

    An example is a dict of lists or tensors of integers. It is one document, or several with "seq_lengths":

        input_ids                            the tokens
        labels                               optional, -100 for no loss; the tokens by default
        completion_mask, assistant_masks     optional, 0 for no loss
        seq_lengths                          optional, lengths of its documents: TRL's packing "bfd" adds this column
        attention_mask                       optional, 1 for each token: tokenizers add it

    The batch has B rows of S tokens:

        input_ids, labels, position_ids      int64 [B, S]. Models shift labels; the label of a document's first token is
                                             -100, so that no token predicts the next document
        document_ids                         int32 [B, S], -1 for padding
        document_lengths                     the lengths in each row, lists of int: they stay on the CPU
        cu_seq_lens_q, cu_seq_lens_k         int32 [N + 1], where documents start in the flattened rows, and the end
        max_length_q, max_length_k           int, length of the longest document
        seq_idx                              int32 [B, S], index of the document in its row

    In position_ids and the last three, padding at the end of a row is one more document, as kernels for varlen
    attention and recurrent layers expect. `sightline.hf.enable` takes document_ids and document_lengths out of the
    keyword arguments of a model; a model that is not enabled gets them as they are.

    max_length      None: one row of all documents, without padding. A number: rows of exactly this many tokens, each
                    document in the first row with room for it, so that all batches have one width
    pad_token_id    token id of padding
    position_start  position of a document's first token: 0, or 2 for RoBERTa and the models derived from it

    Raises:
        ValueError: when called without examples; with an example that is empty or longer than max_length; with a column
            of another length than the tokens, of values that are no integers, or that the batch cannot carry.
    """

    max_length: int | None = None
    pad_token_id: int = 0
    position_start: int = 0

    def __post_init__(self) -> None:
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length must be at least 1 token, or None for one row, got {self.max_length}")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of these examples: a dict of keyword arguments of a model."""
        documents = [document for index, example in enumerate(examples) for document in _split(index, example)]
        if not documents:
            raise ValueError("got no examples to pack; expected at least one with input_ids")
        rows = [documents] if self.max_length is None else _first_fit(documents, self.max_length)
        lengths = [[len(document.tokens) for document in row] for row in rows]
        width = self.max_length or sum(lengths[0])
        padding = [width - sum(row) for row in lengths]
        segments = [row + [pad] * (pad > 0) for row, pad in zip(lengths, padding, strict=True)]
        flat = [length for row in segments for length in row]
        cu_seq_lens = torch.tensor([0, *accumulate(flat)], dtype=torch.int32)
        seq_idx = _rows([[torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(row)] for row in segments])
        counts = torch.tensor([len(row) for row in lengths], dtype=torch.int32)
        return {
            "input_ids": _rows([[d.tokens for d in row] for row in rows], padding, self.pad_token_id),
            "labels": _rows([[d.labels for d in row] for row in rows], padding, IGNORE),
            "position_ids": _rows([[torch.arange(n) + self.position_start for n in row] for row in segments]),
            "document_ids": seq_idx.masked_fill(seq_idx == counts[:, None], PADDING),
            "document_lengths": lengths,
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": max(flat),
            "max_length_k": max(flat),
            "seq_idx": seq_idx,
        }


def _split(index: int, example: Mapping[str, Any]) -> list[Document]:
    """Return the documents of an example: itself, or its parts by "seq_lengths"."""
    if unknown := sorted(set(example) - COLUMNS):
        raise ValueError(
            f"example {index} has the columns {unknown}, which a packed batch does not carry; expected some of "
            f"{sorted(COLUMNS)}; remove them from the dataset (dataset.remove_columns)"
        )
    if "input_ids" not in example:
        raise ValueError(
            f"example {index} has the columns {sorted(example)}; expected input_ids: tokenize the dataset first"
        )
    tokens = _integers(index, example, "input_ids")
    labels = _integers(index, example, "labels", len(tokens)) if "labels" in example else tokens
    if "attention_mask" in example and not bool((_integers(index, example, "attention_mask", len(tokens)) == 1).all()):
        raise ValueError(
            f"example {index} has an attention_mask that is not 1 for each token; expected examples without padding: "
            "tokenize with padding=False, the collator pads"
        )
    for name in LOSS_MASKS:
        if name in example:
            labels = labels.masked_fill(_integers(index, example, name, len(tokens)) == 0, IGNORE)
    lengths = _integers(index, example, "seq_lengths").tolist() if "seq_lengths" in example else [len(tokens)]
    if sum(lengths) != len(tokens) or min(lengths) < 1:
        raise ValueError(
            f"example {index} has {len(tokens)} tokens and seq_lengths {lengths}; expected lengths of at least 1 "
            "whose sum is the number of tokens"
        )
    parts = zip(tokens.split(lengths), labels.split(lengths), strict=True)
    return [Document(part, torch.cat([part.new_tensor([IGNORE]), own[1:]])) for part, own in parts]


def _integers(index: int, example: Mapping[str, Any], name: str, length: int | None = None) -> Tensor:
    """Return a column of an example: int64 [length], with at least one element."""
    try:
        values = torch.as_tensor(example[name])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} of example {index} is no list of integers: {error}") from None
    if values.dim() != 1 or (len(values) and values.is_floating_point()):
        raise ValueError(
            f"{name} of example {index} has shape {tuple(values.shape)} and {values.dtype}; expected a list of integers"
        )
    if not len(values):
        raise ValueError(f"{name} of example {index} is empty; expected at least one token; remove empty documents")
    if length is not None and len(values) != length:
        raise ValueError(
            f"{name} of example {index} has {len(values)} elements for {length} tokens; expected one for each"
        )
    return values.long()


def _first_fit(documents: list[Document], max_length: int) -> list[list[Document]]:
    """Return rows of at most `max_length` tokens; each document is in the first row that had room for it."""
    rows: list[list[Document]] = []
    free: list[int] = []
    for index, document in enumerate(documents):
        length = len(document.tokens)
        if length > max_length:
            raise ValueError(
                f"document {index} of the batch has {length} tokens, more than max_length={max_length}; truncate it "
                "before, or raise max_length"
            )
        row = next((i for i, room in enumerate(free) if room >= length), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(max_length)
        rows[row].append(document)
        free[row] -= length
    return rows


def _rows(parts: list[list[Tensor]], padding: list[int] | None = None, value: int = 0) -> Tensor:
    """Return [B, S]: each row the concatenation of its parts and of `padding[row]` elements of `value`."""
    pads = padding or [0] * len(parts)
    return torch.stack(
        [torch.nn.functional.pad(torch.cat(row), (0, pad), value=value) for row, pad in zip(parts, pads, strict=True)]
    )
