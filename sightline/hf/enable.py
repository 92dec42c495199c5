"""enable(): prepare a model of transformers for packed rows, and disable(), which reverts it.

The registered name alone knows what transformers passes to the attention. `enable` adds hooks that see the arguments of
the whole model, so that documents may be stated, are known to every layer, and survive recomputation.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from sightline.hf.attention import ATTRIBUTES, IS_ENABLED
from sightline.hf.calls import implementations
from sightline.hf.check import check_packed
from sightline.hf.documents import Documents, find_documents, one_document_per_row
from sightline.hf.fused_loss import disable_fused_loss, enable_fused_loss
from sightline.hf.layer_masks import lower_before_forward
from sightline.hf.recurrence import disable_recurrence, enable_recurrence, needs_positions, unsupported_recurrence
from sightline.hf.running import current, enter_forward, inherited, leave_forward
from sightline.masks import AttentionMask
from sightline.torch_private import disable_compiler

NAME = "sightline"
Model = TypeVar("Model", bound=nn.Module)

ADDED = ("document_lengths", "document_ids", "prefix_ids", "attention_masks")
"""Keyword arguments that `enable` adds to a model."""
GIVEN = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "position_ids")
"""Keyword arguments of transformers that may state documents."""
RECORD = "_sightline_record"
_PACKED = "_sightline_packed"
"""Attribute of a cache that holds keys of several documents in a row."""


@dataclass
class Record:
    """Changes of one model, for `disable`.

    implementations  attention implementation of the model's configs before `enable`: {name of the sub-config: name}
    handles          its hooks
    """

    implementations: dict[str, str] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)


def enable(model: Model, check: bool = True, *, fused_loss: bool = False) -> Model:
    """Let a model of transformers attend within documents only, and return it.

    The model may be wrapped by PEFT, DDP, FSDP2 or torch.compile, and loaded with any attention implementation. From
    then on its forward also takes:

    document_ids      int [B, S], the document of each token; -1: padding
    document_lengths  tokens of the documents of each row, a list of lists of integers: costs no wait for a device
    prefix_ids        int [B, S], the document that each token's document continues, its own id if none: a tree of
                      shared prefixes, with `position_ids` that continue from document to document
    attention_masks   an AttentionMask, or {layer type: AttentionMask} if the model has several, in place of all rules

    check       run the model on 16 tokens and compare with each document alone
    fused_loss  compute the output head and the loss in chunks of tokens: the logits of all tokens exist only where
                something else needs them

    Raises:
        ValueError: if packed rows cannot be right in this model; the message says why and what to do.
    """
    roots = list(_models(model))
    if not roots:
        raise ValueError(
            f"sightline.hf.enable needs a model of transformers, or one that wraps it, got {type(model).__name__}"
        )
    disable(model)
    for root in roots:
        _check_class(root)
    for root in roots:
        _enable_one(root)
        if fused_loss:
            enable_fused_loss(root)
    if model not in roots:
        _hook(model, _record(model))
    if check:
        try:
            check_packed(model)
        except ValueError:
            disable(model)
            raise
    return model


def disable(model: Model) -> Model:
    """Revert `enable` and return the model. A model that is not enabled stays as it is."""
    disable_recurrence(model)
    for root in _models(model):
        disable_fused_loss(root)
    for module in model.modules():
        record = vars(module).pop(RECORD, None)
        for name in ATTRIBUTES:
            vars(module).pop(name, None)
        if record is None:
            continue
        for handle in record.handles:
            handle.remove()
        if record.implementations:
            assert isinstance(module, PreTrainedModel)
            module.set_attn_implementation(record.implementations)
    return model


def is_enabled(model: nn.Module) -> bool:
    """Return whether `enable` has prepared a model, or the model that it wraps."""
    return any(RECORD in vars(module) for module in model.modules())


def _models(model: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the outermost models of transformers in a module."""
    if isinstance(model, PreTrainedModel):
        yield model
    else:
        for child in model.children():
            yield from _models(child)


def _check_class(model: PreTrainedModel) -> None:
    cls: Any = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))  # FSDP2 derives a class
    name = cls.__name__
    if not cls._can_set_attn_implementation():
        raise ValueError(
            f"{name} computes its attention itself and takes no attn_implementation: sightline cannot reach it; do not "
            "pack rows for this model"
        )
    if reason := unsupported_recurrence(model):
        raise ValueError(f"{name}: {reason}")
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder: its cross-attention does not know documents; do not pack rows for this "
            "model"
        )
    if "position_ids" not in inspect.signature(cls.forward).parameters and needs_positions(model):
        raise ValueError(
            f"{name} takes no position_ids: positions would run on from document to document; do not pack rows for "
            "this model"
        )


def _enable_one(model: PreTrainedModel) -> None:
    record = _record(model)
    record.implementations = implementations(model)
    model.set_attn_implementation(_requested(model))
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module, "layer_idx"):
            setattr(module, IS_ENABLED, True)
    text = model.config.get_text_config(decoder=True)
    for module in model.modules():  # the decoder may be called by itself; get_decoder() is the model itself in Llama 4
        if module is model or (isinstance(module, PreTrainedModel) and type(module.config) is type(text)):
            _hook(module, record)
    enable_recurrence(model)


def _requested(model: PreTrainedModel) -> dict[str, str]:
    """Return the implementations to set: sightline for the decoder, while encoders of images and audio keep theirs."""
    config, requested = model.config, {"": NAME}
    text = config.get_text_config(decoder=True)
    for name in config.sub_configs:
        sub = getattr(config, name, None)
        if sub is None:
            continue
        if sub is text or text in [getattr(sub, inner, None) for inner in sub.sub_configs]:
            requested[name] = NAME
        else:
            requested[name] = "sdpa" if sub._attn_implementation == NAME else sub._attn_implementation
    return requested


def _record(module: nn.Module) -> Record:
    return vars(module).setdefault(RECORD, Record())


def _hook(module: nn.Module, record: Record) -> None:
    """Find the documents before a module runs. The hooks hold no module, so that a deep copy has working ones."""
    record.handles.append(module.register_forward_pre_hook(_before_forward, with_kwargs=True))
    record.handles.append(module.register_forward_hook(_after_forward, always_call=True))


def _before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return _set_documents(module, args, kwargs, torch.compiler.is_compiling())


@disable_compiler
def _set_documents(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool
) -> tuple[Any, dict[str, Any]]:
    given = {name: kwargs.pop(name) for name in ADDED if name in kwargs}
    outer = inherited(module)
    # Documents from outside were found by the hook of the model that calls this one.
    documents = outer if outer is not None and not given else _find(args, kwargs, given)
    if compiled and documents is not outer:
        lower_before_forward(module, documents)
    enter_forward(module, documents)
    return args, kwargs


@disable_compiler
def _after_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    documents = current()
    cache = getattr(output, "past_key_values", None) or getattr(output, "cache", None)
    if documents is not None and documents.packed and cache is not None:
        vars(cache)[_PACKED] = True
    leave_forward(module)


def _find(args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]) -> Documents | None:
    """Return the documents of a forward with these arguments; None if it continues a cache."""
    tokens = next((x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if x is not None), None)
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return None
    shape = (tokens.shape[0], tokens.shape[1])
    masks = given.pop("attention_masks", None)
    mask = kwargs.get("attention_mask")
    if masks is not None:
        named = {"full_attention": masks} if isinstance(masks, AttentionMask) else dict(masks)
        return Documents(torch.zeros(shape, dtype=torch.int32), "attention_masks", masks=named)
    if mask is not None and mask.dim() == 4 and not given:
        return one_document_per_row(shape, "attention_mask")
    cache = kwargs.get("past_key_values", kwargs.get("cache"))
    if cache is not None and hasattr(cache, "get_seq_length"):
        _refuse_packed_cache(cache)
        if _holds_tokens(cache):
            _refuse_given(given)
            return None
    sources = {name: kwargs.get(name) for name in GIVEN}
    found = find_documents(shape, attention_mask=mask, **sources, **given)
    return one_document_per_row(shape, "the default positions") if found is None else found


def _holds_tokens(cache: Any) -> bool:
    try:
        return int(cache.get_seq_length()) > 0
    except ValueError:  # only recurrent layers, which count no tokens
        return bool(cache.has_previous_state())


def _refuse_packed_cache(cache: Any) -> None:
    if getattr(cache, _PACKED, False):
        raise ValueError(
            "the cache holds several documents of a row: packed rows cannot continue a cache; run each document in a "
            "row of its own"
        )


def _refuse_given(given: dict[str, Any]) -> None:
    if given:
        raise ValueError(
            f"{', '.join(given)} cannot be given together with a cache that holds tokens: packed rows cannot continue "
            "a cache; run each document in a row of its own"
        )
