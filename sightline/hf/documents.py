"""Documents of packed rows, found from every argument by which a model of transformers may receive them.

An argument that states documents decides; positions are only a guess: a document starts where a position is not the
previous one + 1. All tensors are on the CPU, so tensors on a device cost one synchronization, and `document_lengths`,
a list of lists of integers, none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.attention import Exchanges, LocalExchanges
from sightline.hf.trees import check_tree
from sightline.masks import AttentionMask, document, prefix_tree

CONTEXT = "context_parallel"
"""Source of the documents of a rank's tokens, and a keyword argument that marks these tokens."""


DISPATCHED = (
    "accelerate cuts the batches of an IterableDataset by rows, cu_seq_lens_q too: pass dispatch_batches=False to it "
    "(Trainer: accelerator_config={'dispatch_batches': False})"
)


@dataclass(frozen=True, eq=False)
class Documents:
    """Where documents lie in the rows of one forward.

    ids        int32 [B, S], on the CPU; -1: padding
    source     argument that they come from, for errors
    parents    int32 [B, S], the document that each token's document continues, its own id if none: a tree of shared
               prefixes; None if there is no tree
    positions  int64 [B, S], positions in the tree, in which windows and chunks are counted: they ascend by 1 in each
               document, and from a document to those that continue it
    masks      the masks themselves, by layer type, in place of the rules of transformers
    exchanges  provides the keys of `masks` under context parallelism
    prepared   masks that were lowered for these documents, shared by all layers of the forward
    """

    ids: Tensor
    source: str
    parents: Tensor | None = None
    positions: Tensor | None = None
    masks: Mapping[str, Any] | None = None
    exchanges: Exchanges = field(default_factory=LocalExchanges)
    prepared: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def packed(self) -> bool:
        """Whether any row has more than one document."""
        if self.masks is not None:
            return True
        first = self.ids.amax(dim=1, keepdim=True)
        return bool(((self.ids >= 0) & (self.ids != first)).any())

    @cached_property
    def index_in_document(self) -> Tensor:
        """int64 [B, S], index of each token in its document."""
        index = torch.arange(self.ids.shape[1]).expand(self.ids.shape)
        last = index.masked_fill(self.ids < 0, 0).cummax(dim=1).values  # padding inside a document does not end it
        return index - index.masked_fill(~_starts(self.ids.gather(1, last)), 0).cummax(dim=1).values

    @cached_property
    def mask(self) -> AttentionMask:
        """Mask of each token's document, in both directions, and of those that it continues."""
        return document(self.ids) if self.tree is None else self.tree

    @cached_property
    def tree(self) -> AttentionMask | None:
        """Mask of each token's document and those that it continues; None if documents continue no others."""
        return None if self.parents is None else prefix_tree(self.ids, self.parents)


def find_documents(
    shape: tuple[int, int],
    *,
    document_lengths: Sequence[Sequence[int]] | None = None,
    document_ids: Tensor | None = None,
    prefix_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    seq_idx: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    guess: Tensor | None = None,
) -> Documents | None:
    """Return the documents of rows of the given (B, S), or None if no argument says anything about them.

    document_lengths  tokens of the documents of each row, in order; the rest of a row is padding. With it, tensors that
                      are on a device are not read, which would wait for the device
    document_ids      int [B, S]; -1: padding
    prefix_ids        int [B, S], the document that each token's document continues; its own id if none
    cu_seq_lens_q/_k  int [N + 1], starts of all documents in the concatenated rows, and the end
    seq_idx           int [B, S], document numbers
    attention_mask    [B, S]: 0 is padding; integers from 1 on are documents if any is more than 1
    position_ids      [B, S], or [4, B, S] with text positions first, or [3, B, S]
    guess             int [B, S], documents that were inferred from position_ids that are not known here

    Raises:
        ValueError: if arguments have a wrong shape, or state different documents.
    """
    checked_positions = position_ids
    if document_lengths is not None:
        _check_count(document_lengths, cu_seq_lens_q)
        document_ids, seq_idx, cu_seq_lens_q, attention_mask, checked_positions = (
            None if x is None or x.device.type != "cpu" else x
            for x in (document_ids, seq_idx, cu_seq_lens_q, attention_mask, position_ids)
        )
    padding = None
    if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[1] == shape[1]:
        attention_mask = attention_mask.cpu()
        padding = attention_mask == 0
    found: dict[str, Tensor] = {}
    if document_lengths is not None:
        found["document_lengths"] = _from_lengths(document_lengths, shape)
    if document_ids is not None:
        found["document_ids"] = _as_ids("document_ids", document_ids, shape)
    if padding is not None and attention_mask is not None and _numbers_documents(attention_mask):
        found["attention_mask"] = attention_mask.to(torch.int32) - 1
    if seq_idx is not None:
        found["seq_idx"] = _as_ids("seq_idx", seq_idx, shape)
    if cu_seq_lens_q is not None:
        found["cu_seq_lens_q"] = _from_cumulative(cu_seq_lens_q, cu_seq_lens_k, shape)
    if found:
        source, ids = next(iter(found.items()))
        ids = ids if padding is None else ids.masked_fill(padding, -1)
        for name, other in found.items():
            _check_agreement(source, ids, name, other)
        _check_contiguous(source, ids)
        _check_positions(source, ids, checked_positions)
    elif (inferred := _infer(shape, position_ids, guess, padding)) is not None:
        source, ids = inferred
    else:
        return None
    if prefix_ids is None:
        return Documents(ids, source)
    return _tree(ids, source, prefix_ids, position_ids, shape)


def _infer(
    shape: tuple[int, int], position_ids: Tensor | None, guess: Tensor | None, padding: Tensor | None
) -> tuple[str, Tensor] | None:
    """Return the documents that no argument states, and the argument that suggests them; None if there is none."""
    if position_ids is not None:
        return "position_ids", _from_positions(position_ids, padding, shape)
    if guess is not None:
        ids = guess.cpu().to(torch.int32).expand(shape)
        return "position_ids", ids if padding is None else ids.masked_fill(padding, -1)
    if padding is not None and bool(padding.any()):
        return "attention_mask", torch.where(padding, -1, 0).to(torch.int32)
    return None


def one_document_per_row(shape: tuple[int, int], source: str) -> Documents:
    """Return rows of one document each, without padding."""
    return Documents(torch.zeros(shape, dtype=torch.int32), source)


def _tree(
    ids: Tensor, source: str, prefix_ids: Tensor, position_ids: Tensor | None, shape: tuple[int, int]
) -> Documents:
    if source == "position_ids":
        raise ValueError("prefix_ids name documents, which position_ids cannot; pass document_ids as well")
    if position_ids is None or position_ids.dim() != 2:
        raise ValueError(
            "prefix_ids need position_ids [B, S] that continue from a document to those that continue it, got "
            f"{'none' if position_ids is None else tuple(position_ids.shape)}"
        )
    parents = torch.where(ids < 0, ids, _as_ids("prefix_ids", prefix_ids, shape))
    positions = position_ids.cpu().long().expand(shape)
    check_tree(ids, parents, positions)
    return Documents(ids, source, parents, positions)


def _numbers_documents(attention_mask: Tensor) -> bool:
    """Return whether a mask [B, S] numbers documents from 1 on. Numbers that are no integers are weights of tokens."""
    return not attention_mask.is_floating_point() and bool((attention_mask > 1).any())


def _as_ids(name: str, ids: Tensor | Sequence[Sequence[int]], shape: tuple[int, int]) -> Tensor:
    try:
        ids = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be integers [B, S] = {list(shape)}: {error}") from None
    if tuple(ids.shape) != shape or ids.is_floating_point():
        raise ValueError(f"{name} must be integers [B, S] = {list(shape)}, got {ids.dtype} {list(ids.shape)}")
    ids = ids.cpu().long()
    if ids.numel() and (int(ids.min()) < -1 or int(ids.max()) >= 2**31):
        raise ValueError(
            f"{name} must be from 0 to 2**31 - 1, or -1 for padding, got {int(ids.min())} to {int(ids.max())}; number "
            "the documents of each row from 0"
        )
    return ids.to(torch.int32)


def _from_lengths(lengths: Sequence[Sequence[int]], shape: tuple[int, int]) -> Tensor:
    rows, length = shape
    if isinstance(lengths, Tensor):
        lengths = lengths.tolist()
    counts = [list(row) if isinstance(row, Sequence) else [row] for row in lengths]
    integers = all(isinstance(count, int) and count > 0 for row in counts for count in row)
    if len(counts) != rows or not integers or any(sum(row) > length for row in counts):
        raise ValueError(
            f"document_lengths must list the tokens of each document, at least 1, for each of {rows} rows of {length} "
            f"tokens, got {lengths}"
        )
    ids = torch.full(shape, -1, dtype=torch.int32)
    for row, of_row in zip(ids, counts, strict=True):
        row[: sum(of_row)] = torch.repeat_interleave(torch.arange(len(of_row)), torch.tensor(of_row, dtype=torch.long))
    return ids


def _from_cumulative(cumulative: Tensor, of_keys: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Return the ids of documents that start at `cumulative` in the concatenated rows; each row starts a document."""
    starts = cumulative.cpu().long()
    if of_keys is not None and not torch.equal(starts, of_keys.cpu().long()):
        raise ValueError(
            "cu_seq_lens_q and cu_seq_lens_k differ: a document's queries and keys must be the same tokens"
        )
    rows, length = shape
    if starts.dim() != 1 or len(starts) < 2 or starts[0] != 0 or bool((starts.diff() < 0).any()):
        raise ValueError(
            f"cu_seq_lens_q must be ascending integers [N + 1] that start with 0, got {starts.tolist()}. {DISPATCHED}"
        )
    if int(starts[-1]) != rows * length:
        raise ValueError(
            f"cu_seq_lens_q ends at {int(starts[-1])}, but there are {rows} x {length} tokens; give padding a "
            f"document of its own. {DISPATCHED}"
        )
    is_start = torch.zeros(rows * length + 1, dtype=torch.bool)
    is_start[starts] = True
    is_start = is_start[:-1].view(shape)
    is_start[:, 0] = True
    return is_start.cumsum(dim=1).to(torch.int32) - 1


def _from_positions(position_ids: Tensor, padding: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Return the documents that positions suggest: one starts where a position is not the previous one + 1."""
    positions = position_ids.cpu()
    if positions.dim() == 3 and positions.shape[0] == 4:
        positions = positions[0]  # text positions, then the three of M-RoPE
    if positions.dim() == 3:
        return _from_mrope(positions, padding, shape)
    if positions.dim() > 2 or positions.shape[-1] != shape[1]:
        raise ValueError(
            f"position_ids of shape {list(position_ids.shape)} do not say where documents of [B, S] = {list(shape)} "
            "start; pass document_ids, which sightline.hf.enable adds to the model's arguments"
        )
    positions = positions.expand(shape)
    if padding is None:
        starts = F.pad(positions.diff(dim=1) != 1, (1, 0))
        return starts.cumsum(dim=1).to(torch.int32)
    # Compare with the last token before that is no padding. Positions may count the padding between, or not.
    index = torch.arange(shape[1]).expand(shape)
    last = F.pad(index.masked_fill(padding, -1).cummax(dim=1).values[:, :-1], (1, 0), value=-1)
    step = positions - positions.gather(1, last.clamp(min=0))
    starts = (last >= 0) & ~padding & (step != 1) & (step != index - last)
    return starts.cumsum(dim=1).masked_fill(padding, -1).to(torch.int32)


def _from_mrope(positions: Tensor, padding: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """Return one document per row, if M-RoPE positions [3, B, S] allow no other reading.

    Within a document the temporal position never falls, and no two tokens have the same three positions.
    """
    step = positions.diff(dim=2)
    new = (step[0] < 0) | (step == 0).all(dim=0)
    if padding is not None:
        new &= ~(padding[:, 1:] | padding[:, :-1])
    if bool(new.any()):
        row, token = new.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids of shape {list(positions.shape)} restart at token {token + 1} of row {row}: the row holds "
            "several documents, whose starts cannot be told from these positions; pass document_ids (enable the model "
            "with sightline.hf.enable), or position_ids [4, B, S] with text positions first"
        )
    ids = torch.zeros(shape, dtype=torch.int32)
    return ids if padding is None else ids.masked_fill(padding, -1)


def _starts(ids: Tensor) -> Tensor:
    """Return where a document starts: bool [B, S]."""
    return F.pad(ids.diff(dim=1) != 0, (1, 0), value=True)


def _check_count(lengths: Sequence[Sequence[int]], cumulative: Tensor | None) -> None:
    """Check that cu_seq_lens_q is not too short for the documents, which needs no value from a device."""
    documents = sum(len(row) if isinstance(row, Sequence) else 1 for row in lengths)
    if cumulative is not None and len(cumulative) <= documents:
        raise ValueError(
            f"document_lengths has {documents} documents, but cu_seq_lens_q has {len(cumulative)} elements; expected "
            f"the start of each document, and the end. {DISPATCHED}"
        )


def _check_agreement(source: str, ids: Tensor, name: str, other: Tensor) -> None:
    """Check that two sources divide the tokens that are no padding in the same way."""
    both = (ids[:, 1:] >= 0) & (ids[:, :-1] >= 0)
    differs = both & (_starts(ids) != _starts(other))[:, 1:]
    if bool(differs.any()):
        row, token = differs.nonzero()[0].tolist()
        raise ValueError(
            f"{source} and {name} state different documents, first at token {token + 1} of row {row}; pass one of "
            "them, or make them agree"
        )


def _check_contiguous(source: str, ids: Tensor) -> None:
    """Check that the tokens of a document are next to each other, but for padding.

    If they are not, an id may stand for two documents, and windows and chunks by index would be wrong.
    """
    for row, tokens in enumerate(ids):
        in_order = tokens[tokens >= 0].unique_consecutive()
        values, counts = in_order.unique(return_counts=True)
        if len(values) < len(in_order):
            raise ValueError(
                f"{source} has document {int(values[counts > 1][0])} at several places of row {row}; give each "
                "document a number of its own, and put its tokens next to each other"
            )


def _check_positions(source: str, ids: Tensor, position_ids: Tensor | None) -> None:
    """Check that no position is 0 inside a document: it would be a start. Other positions may be any."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[-1] != ids.shape[1]:
        return
    inside = ~_starts(ids) & (ids >= 0) & (position_ids.cpu() == 0)
    if bool(inside.any()):
        row, token = inside.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids start a document at token {token} of row {row}, but {source} says that this token "
            "continues one; correct one of them"
        )
