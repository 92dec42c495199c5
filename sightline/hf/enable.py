"""enable(): prepare a model of transformers for packed rows, and disable(), which reverts it.

The registered name alone knows what transformers passes to the attention. `enable` replaces the forward by one that
gets the arguments of the whole model, so that documents may be stated, are known to every layer, and survive
recomputation.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from sightline.hf.attention import ATTRIBUTES, IS_ENABLED
from sightline.hf.calls import implementations, position_start
from sightline.hf.check import check_packed
from sightline.hf.forward import replace_forward, restore_forward
from sightline.hf.fused_loss import disable_fused_loss, enable_fused_loss
from sightline.hf.padded_batches import restore_batches
from sightline.hf.recurrence import (
    PASSES_DOCUMENTS,
    disable_recurrence,
    enable_recurrence,
    needs_positions,
    unsupported_recurrence,
)

NAME = "sightline"
Model = TypeVar("Model", bound=nn.Module)

BEFORE = "_sightline_before"
"""Attribute of an enabled model: the attention implementations that it had before."""


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
    roots = list(models_in(model))
    if not roots:
        raise ValueError(
            f"sightline.hf.enable needs a model of transformers, or one that wraps it, got {type(model).__name__}"
        )
    disable(model)
    _refuse_virtual_tokens(model)
    for root in roots:
        _check_class(root)
    for root in roots:
        if fused_loss:
            enable_fused_loss(root)
        _enable_one(root)
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
    for module in model.modules():
        restore_forward(module)
        restore_batches(module)
        for name in ATTRIBUTES:
            vars(module).pop(name, None)
        if (before := vars(module).pop(BEFORE, None)) is not None:
            assert isinstance(module, PreTrainedModel)
            module.set_attn_implementation(before)
    for root in models_in(model):
        disable_fused_loss(root)
    return model


def is_enabled(model: nn.Module) -> bool:
    """Return whether `enable` has prepared a model, or the model that it wraps."""
    return any(BEFORE in vars(module) for module in model.modules())


def models_in(model: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield the outermost models of transformers in a module."""
    if isinstance(model, PreTrainedModel):
        yield model
    else:
        for child in model.children():
            yield from models_in(child)


def _refuse_virtual_tokens(model: nn.Module) -> None:
    """Refuse the adapters of PEFT that put learned tokens before each row, for which it drops position_ids."""
    for module in model.modules():
        config = getattr(module, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"{type(config).__name__} puts virtual tokens before each row, not before each document: do not pack "
                "rows with it; use LoRA, or keep the model's own attention implementation"
            )


def _check_class(model: PreTrainedModel) -> None:
    cls: Any = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))  # FSDP2 derives a class
    name = cls.__name__
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if not (decoder if isinstance(decoder, PreTrainedModel) else model)._can_set_attn_implementation():
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
    vars(model)[BEFORE] = implementations(model)
    model.set_attn_implementation(_requested(model))
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module, "layer_idx"):
            setattr(module, IS_ENABLED, True)
    enable_recurrence(model)
    start, text = position_start(model), model.config.get_text_config(decoder=True)
    for module in model.modules():  # the decoder may be called by itself; get_decoder() is the model itself in Llama 4
        is_decoder = isinstance(module, PreTrainedModel) and type(module.config) is type(text)
        if module is model or is_decoder or PASSES_DOCUMENTS in vars(module):
            replace_forward(module, start)


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
        elif sub._attn_implementation == NAME:
            requested[name] = _default_implementation(model, sub)
        else:
            requested[name] = sub._attn_implementation
    return requested


def _default_implementation(model: PreTrainedModel, config: PreTrainedConfig) -> str:
    """Return what transformers chooses for the part of a model that has this config: sdpa, or eager."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config is config:
            return part.get_correct_attn_implementation(None)
    return "sdpa"
