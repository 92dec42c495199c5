"""PendingMask: the attention mask that layers receive, which is built when the first of them attends.

A mask builder of transformers knows the rule, but not always the documents: some models do not pass positions to it,
and chunks are counted within documents. So the builder's call only notes the rule, and the first attention of the
forward builds and lowers the mask for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sightline.attention import Lowered, lower
from sightline.hf.documents import Documents, find_documents
from sightline.hf.rules import Causal, Dense, Reading, Rule, Tokens, layer_type, read_rule
from sightline.hf.running import current
from sightline.masks import AttentionMask, document

SOURCES = (
    "document_lengths", "document_ids", "prefix_ids", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "position_ids",
)  # fmt: skip
"""Keyword arguments of a layer that may say where documents lie."""


LOWERED_BEFORE = "lowered before the model runs"
"""Stands for the mask under torch.compile: the attention layers have it already."""

NO_TENSOR = (
    "this model uses its attention mask as a tensor ({}) outside of the attention function, for example in a sparse "
    "indexer: sightline cannot do the same; use attn_implementation='sdpa' and do not pack rows"
)


class NoTensor(ValueError, AttributeError):
    """Raised if a model uses the mask as a tensor. An AttributeError, so that `hasattr` is False."""


@dataclass(eq=False)
class PendingMask:
    """Mask of one rule for the rows of one forward.

    reading     the rule, and documents inferred by transformers
    shape       (B, Q, T)
    first_query index of the first query in its row: the number of cached tokens
    key_offset  index of the first key
    padding     bool [B, T], keys that are no padding; None if there is none
    documents   those of the forward in which the mask was made. It is noted here, because layers that are recomputed in
                the backward pass run after that forward
    """

    reading: Reading
    shape: tuple[int, int, int]
    first_query: int = 0
    key_offset: int = 0
    padding: Tensor | None = None
    documents: Documents | None = field(default_factory=current)
    _lowered: dict[Any, Lowered] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        raise NoTensor(NO_TENSOR.format(name))

    def __getitem__(self, index: Any) -> Any:
        self.__getattr__("indexing")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NoTensor(NO_TENSOR.format(getattr(function, "__name__", function)))

    @property
    def rule(self) -> Rule:
        return self.reading.rule

    def lower(self, sources: dict[str, Any], describe: str, **requirements: Any) -> Lowered:
        """Return the mask lowered for a kernel, the same object for all layers with the same requirements.

        sources       keyword arguments of the layer, which are used if the forward has no documents of its own
        describe      name of the layer, for errors
        requirements  arguments of `sightline.attention.lower`

        Raises:
            ValueError: if nothing says where documents lie.
        """
        key = tuple(requirements.values())
        if key not in self._lowered:
            if self.documents is None:
                self.documents = self._find_documents(sources, describe)
            mask, exchange = self._build(describe), None
            if self.documents is not None and self.documents.masks is not None:
                mask, exchange = self.documents.exchanges.bind(mask, requirements["device"])
            self._lowered[key] = lower(mask, exchange=exchange, **requirements)
        return self._lowered[key]

    def replace_documents(self, documents: Documents | None) -> None:
        """Take these documents in place of those noted when the mask was made, unless a layer has used the mask."""
        if not self._lowered:
            self.documents = documents

    @property
    def continues_cache(self) -> bool:
        """Whether the keys are not those of the queries: there is a cache, or they belong to another sequence."""
        return self.shape[1] != self.shape[2]

    def _find_documents(self, sources: dict[str, Any], describe: str) -> Documents | None:
        rows, queries, _ = self.shape
        if self.continues_cache:
            return None
        given = {name: sources.get(name) for name in SOURCES}
        padding, guess = self.padding, self.reading.document_ids
        documents = find_documents((rows, queries), attention_mask=padding, guess=guess, **given)
        if documents is None:
            raise ValueError(
                f"{describe}: nothing tells sightline where the documents of a row start: this model passes neither "
                "position_ids nor cu_seq_lens_q to this layer. Call sightline.hf.enable(model) once after loading it; "
                "for an encoder of images or audio, pass attn_implementation={'vision_config': 'sdpa'}"
            )
        return documents

    def _build(self, describe: str) -> Any:
        documents, (rows, queries, keys) = self.documents, self.shape
        if documents is None or self.continues_cache:
            return self._build_for_cache(describe)
        if tuple(documents.ids.shape) != (rows, queries):
            raise ValueError(
                f"{describe}: attention over {rows} x {queries} tokens in a forward of {list(documents.ids.shape)} "
                "tokens: sightline does not know their documents; keep this part of the model on "
                "attn_implementation='sdpa'"
            )
        if documents.masks is not None:
            return _named_mask(documents.masks, self.rule, describe)
        index = torch.arange(queries).expand(rows, -1)
        tokens = Tokens(index, keys, self.key_offset, documents.index_in_document, documents.tree, documents.positions)
        mask = self.rule.mask(tokens)
        both = mask & documents.mask
        if isinstance(self.rule, Dense) and documents.source == "position_ids" and not both.equal(mask):
            raise ValueError(
                f"{describe}: the attention mask [B, 1, Q, T] and position_ids disagree about documents; call "
                "sightline.hf.enable(model), after which a mask given to the model decides, or pass document_ids"
            )
        return both

    def _build_for_cache(self, describe: str) -> AttentionMask:
        rows, queries, keys = self.shape
        if self.documents is not None and self.documents.packed:
            raise ValueError(
                f"{describe}: {keys} keys for {queries} queries in rows of several documents: packed rows cannot "
                "fill or continue a cache; run each document in a row of its own, or pass use_cache=False"
            )
        if not any(isinstance(part, Causal | Dense) for part in self.rule.parts()):
            raise ValueError(
                f"{describe}: {keys} keys for {queries} queries without a causal mask (cross-attention): sightline "
                "does not know which documents the keys belong to; use attn_implementation='sdpa'"
            )
        index = torch.arange(queries).expand(rows, -1) + self.first_query
        mask = self.rule.mask(Tokens(index, keys, self.key_offset))
        if self.padding is None:
            return mask
        return mask & document(torch.zeros_like(index), torch.where(self.padding.cpu(), 0, -1))


def _named_mask(masks: Any, rule: Rule, describe: str) -> Any:
    name = layer_type(rule)
    if name not in masks:
        raise ValueError(
            f"{describe}: attention_masks has no mask for layers of type {name!r}; it has {sorted(masks)}. Pass one "
            "for each layer type of the model"
        )
    return masks[name]


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> PendingMask | str:
    """Return the pending mask of a builder's call: the mask function of `attn_implementation="sightline"`.

    The arguments are those of `transformers.masking_utils.sdpa_mask`. Under torch.compile it is `LOWERED_BEFORE`.
    """
    if torch.compiler.is_compiling():
        return LOWERED_BEFORE
    assert mask_function is not None, "transformers' mask builders pass a mask function"
    padding = None
    if attention_mask is not None and not bool(attention_mask.all()):
        missing = kv_offset + kv_length - attention_mask.shape[1]
        padding = torch.nn.functional.pad(attention_mask, (0, max(0, missing)))[:, kv_offset : kv_offset + kv_length]
    shape = (batch_size, q_length, kv_length)
    return PendingMask(read_rule(mask_function), shape, int(q_offset), int(kv_offset), padding)
