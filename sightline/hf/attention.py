"""The attention function of `attn_implementation="sightline"`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sightline.attention import Lowered, attend
from sightline.hf.documents import Documents
from sightline.hf.masks import LOWERED_BEFORE, SOURCES, PendingMask
from sightline.hf.name_alone import refuse_without_enable
from sightline.hf.rules import All, Causal, Chunk, Dense, Full, Reading, Rule, Window
from sightline.hf.running import current, inherited
from sightline.precision import autocast_dtype

IS_ENABLED = "sightline_enabled"
"""Attribute of the attention layers of a model that `enable` has prepared."""

NOTE = "sightline_note"
"""Attribute of the same layers: the rule of the mask of their last forward, and what its kernel had to support."""

LOWERED = "sightline_lowered"
"""Attribute of the same layers under torch.compile: their mask, which was lowered before the model runs."""

ATTRIBUTES = (IS_ENABLED, NOTE, LOWERED)

MASKED = -9999.0
"""Largest value of an additive mask that hides a key; transformers uses the lowest finite number, or -10000."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PendingMask | Tensor | str | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention over the documents of packed rows: [B, Q, H, Dv], and no attention weights.

    query           [B, H, Q, D]
    key, value      [B, G, T, D] and [B, G, T, Dv]
    attention_mask  the result of `make_mask`; a mask [B, 1, Q, T] of the caller or of the model, boolean or additive;
                    `LOWERED_BEFORE` under torch.compile; None in models that use no mask builder
    s_aux           [H], learned sink logits
    kwargs          other arguments of the layer; those in SOURCES may state documents

    Raises:
        ValueError: if nothing says where documents lie, or the layer needs what sightline does not compute.
    """
    _refuse_arguments(type(module).__name__, dropout, kwargs)
    if isinstance(attention_mask, str) or torch.compiler.is_compiling():
        lowered = _lowered_before(module, attention_mask)
    else:
        lowered = _lower(module, query, key, value, attention_mask, is_causal, s_aux, softcap, kwargs)
    key, value = lowered.exchange.start(key, value).wait()
    out = attend(query, key, value, lowered, scale=scaling, sinks=s_aux, softcap=softcap)
    return out.transpose(1, 2).contiguous(), None


class Note(NamedTuple):
    """Rule of a layer's mask, and the arguments of `sightline.attention.lower` for it."""

    rule: Rule
    requirements: dict[str, Any]


def _lower(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: PendingMask | Tensor | None,
    is_causal: bool | None,
    s_aux: Tensor | None,
    softcap: float | None,
    kwargs: dict[str, Any],
) -> Lowered:
    """Return the lowered mask of a layer, the same object for all layers with one rule."""
    describe = type(module).__name__
    if attention_mask is None:
        attention_mask = _default_mask(module, query, key, is_causal, kwargs)
    elif isinstance(attention_mask, Tensor):
        attention_mask = _dense_mask(attention_mask, query, key, describe)
    if not getattr(module, IS_ENABLED, False) or attention_mask.documents is None:  # None: made by `generate`
        attention_mask.replace_documents(_running_documents(module))
    attention_mask = _match_keys(attention_mask, module, query, key)
    inputs = [x for x in (query, key, value, s_aux) if x is not None]
    requirements: dict[str, Any] = {
        "device": query.device,
        "dtype": autocast_dtype(query) or query.dtype,
        "training": torch.is_grad_enabled() and any(x.requires_grad for x in inputs),
        "sinks": s_aux is not None,
        "head_dim": query.shape[-1],
        "value_dim": value.shape[-1],
        "softcap": softcap is not None,
    }
    if getattr(module, IS_ENABLED, False):
        vars(module)[NOTE] = Note(attention_mask.rule, requirements)
    lowered = attention_mask.lower({name: kwargs.get(name) for name in SOURCES}, describe, **requirements)
    if not getattr(module, IS_ENABLED, False):
        refuse_without_enable(module, attention_mask.documents)
    return lowered


def _running_documents(module: nn.Module) -> Documents | None:
    """Return the documents of the running forward, but not those that another model's interrupted forward has left."""
    return current() if getattr(module, IS_ENABLED, False) else inherited(module)


def _lowered_before(module: nn.Module, attention_mask: PendingMask | Tensor | str | None) -> Lowered:
    """Return the mask that was lowered before a compiled model runs: nothing here breaks the graph.

    Raises:
        ValueError: if there is none.
    """
    lowered = getattr(module, LOWERED, None)
    if lowered is None or attention_mask not in (None, LOWERED_BEFORE):
        raise ValueError(
            f"{type(module).__name__}: torch.compile needs masks that are known before the model runs: call "
            "sightline.hf.enable(model) before torch.compile, and compile no forward with a cache, with a mask "
            "[B, 1, Q, T], or with spans of images"
        )
    return lowered


def _refuse_arguments(describe: str, dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout:
        raise ValueError(
            f"{describe}: attention dropout {dropout} is not supported by sightline; set it to 0 in the model's config "
            "(attention_dropout, attn_pdrop or attention_probs_dropout_prob)"
        )
    for name in ("position_bias", "attention_bias", "alibi", "head_mask"):
        if isinstance(kwargs.get(name), Tensor):
            raise ValueError(
                f"{describe}: {name} is added to the attention scores, which sightline does not support; use "
                "attn_implementation='eager' and do not pack rows"
            )
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"{describe}: output_attentions=True needs the weights of all pairs, which sightline never computes; use "
            "attn_implementation='eager'"
        )


def _default_mask(
    module: nn.Module, query: Tensor, key: Tensor, is_causal: bool | None, kwargs: dict[str, Any]
) -> PendingMask:
    """Return the mask of a layer that was given none.

    Raises:
        ValueError: if the layer had a mask that somebody took away, or is recomputed without one.
    """
    describe = type(module).__name__
    if is_causal:
        raise ValueError(
            f"{describe}: the layer's mask was removed and replaced by is_causal=True, as accelerate's context "
            "parallelism does: documents, windows and chunks would be lost. Use sightline.hf.context_parallel"
        )
    documents = _running_documents(module)
    if documents is None and getattr(module, IS_ENABLED, False):
        raise ValueError(
            f"{describe}: this layer is called without a mask, outside of the model's forward (gradient checkpointing "
            "recomputes it in the backward pass): its documents are not known any more; disable gradient checkpointing "
            "for this model"
        )
    (rows, _, queries, _), keys = query.shape, key.shape[2]
    causal = (getattr(module, "is_causal", True) if is_causal is None else is_causal) and queries > 1
    rule: Rule = Causal() if causal or queries < keys else Full()
    if kwargs.get("sliding_window"):
        rule = All((rule, Window(kwargs["sliding_window"] - 1, None)))
    shape = (rows, queries, keys)
    if documents is None:
        return PendingMask(Reading(rule, None), shape, keys - queries)
    return documents.prepared.setdefault((rule, shape), PendingMask(Reading(rule, None), shape, keys - queries))


def _dense_mask(given: Tensor, query: Tensor, key: Tensor, describe: str) -> PendingMask:
    """Return the pending mask of a dense one, which is converted once for all layers.

    Raises:
        ValueError: if it is not [B, 1, Q, T], or adds a bias to visible pairs.
    """
    known = getattr(given, "_sightline_mask", None)
    if known is not None:
        return known
    shape = (query.shape[0], query.shape[2], key.shape[2])
    if given.dim() != 4 or given.shape[1] != 1 or given.shape[2] != shape[1] or given.shape[3] < shape[2]:
        raise ValueError(
            f"{describe}: the mask has the shape {list(given.shape)}, but sightline needs [B, 1, Q, T] = "
            f"{[shape[0], 1, shape[1], shape[2]]}: the same mask for all heads"
        )
    mask = given[:, 0, :, : shape[2]].expand(shape)
    visible = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and bool((~visible & (mask > MASKED)).any()):
        raise ValueError(
            f"{describe}: the mask adds a bias to attention scores, which sightline does not support; use "
            "attn_implementation='eager'"
        )
    pending = PendingMask(Reading(Dense(visible), None), shape, shape[2] - shape[1])
    given._sightline_mask = pending  # type: ignore[attr-defined]
    return pending


def _match_keys(mask: PendingMask, module: nn.Module, query: Tensor, key: Tensor) -> PendingMask:
    """Return the mask of a layer whose keys are not those that the mask builder has counted.

    With a cache, a builder counts the keys of one layer, which may hold none. One query without padding attends to all.

    Raises:
        ValueError: if the layer has keys of its own.
    """
    shape = (query.shape[0], query.shape[2], key.shape[2])
    if mask.shape == shape:
        return mask
    one_query = shape[1] == 1 and mask.shape[:2] == shape[:2]
    limited = mask.padding is not None or any(isinstance(part, Window | Chunk) for part in mask.rule.parts())
    if one_query and mask.documents is None and not limited:
        return PendingMask(mask.reading, shape, shape[2] - 1)
    raise ValueError(
        f"{type(module).__name__} attends to {shape[2]} keys for {shape[1]} queries in {shape[0]} rows, but the mask "
        f"of the model is for (B, Q, T) = {mask.shape}: it compresses, selects or adds keys, whose documents sightline "
        "does not know; use attn_implementation='eager' or 'sdpa' and do not pack rows for this model"
    )
