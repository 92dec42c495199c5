"""Masks of all layer types of a model before it runs, for context parallelism and torch.compile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sightline.attention import Lowered, lower
from sightline.hf.attention import IS_ENABLED, LOWERED, NOTE
from sightline.hf.check import evaluation
from sightline.hf.documents import Documents
from sightline.hf.rules import Rule, Tokens, layer_type
from sightline.masks import AttentionMask

PROBE_LENGTH = 4


def layer_rules(model: nn.Module) -> dict[str, Rule]:
    """Return the rule of each layer type of an enabled model, {"full_attention": ..., "sliding_attention": ...}.

    Attention layers note their rule in each forward. If the model has not run yet, it runs on a few tokens.

    Raises:
        ValueError: if the model is not enabled, layers of one type have different rules, or a rule depends on the
            inputs, such as the spans of images.
    """
    rules: dict[str, Rule] = {}
    for layer in _noted_layers(model):
        rule = vars(layer)[NOTE].rule
        name = layer_type(rule)
        if not rule.is_static():
            raise ValueError(
                f"{type(layer).__name__}: its mask depends on the inputs of the forward (spans of images, or a mask "
                "function of its own): it cannot be built before the model runs; pass attention_masks to the model"
            )
        if rules.setdefault(name, rule) != rule:
            raise ValueError(
                f"layers of type {name} have different masks, {rules[name]} and {rule}; sightline needs one for each "
                "layer type"
            )
    return rules


def layer_types(model: nn.Module) -> Mapping[str, int]:
    """Return the number of attention layers of each layer type of an enabled model."""
    return Counter(layer_type(vars(layer)[NOTE].rule) for layer in _noted_layers(model))


def build_masks(model: nn.Module, documents: Documents) -> dict[str, AttentionMask]:
    """Return the mask of each layer type of an enabled model, [B, S, S] on the CPU, for these documents."""
    rows, length = documents.ids.shape
    index = torch.arange(length).expand(rows, -1)
    tokens = Tokens(index, length, 0, documents.index_in_document, documents.tree, documents.positions)
    return {name: rule.mask(tokens) & documents.mask for name, rule in layer_rules(model).items()}


def lower_before_forward(model: nn.Module, documents: Documents | None) -> None:
    """Give each attention layer its lowered mask, for a forward in which torch.compile allows no reading of masks.

    All layers of one type share a mask. With a cache (no documents) they get none.
    """
    layers = _noted_layers(model)
    masks = {} if documents is None else documents.masks or build_masks(model, documents)
    lowered: dict[Any, Lowered] = {}
    for layer in layers:
        vars(layer).pop(LOWERED, None)
        if documents is None:
            continue
        note = vars(layer)[NOTE]
        requirements = {**note.requirements, "training": torch.is_grad_enabled()}
        key = (layer_type(note.rule), *requirements.values())
        if key not in lowered:
            mask, exchange = documents.exchanges.bind(masks[key[0]], requirements["device"])
            lowered[key] = lower(mask, exchange=exchange, **requirements)
        vars(layer)[LOWERED] = lowered[key]


def _noted_layers(model: nn.Module) -> list[nn.Module]:
    """Return the attention layers of an enabled model, which have noted their rules."""
    layers = [module for module in model.modules() if getattr(module, IS_ENABLED, False)]
    if not layers:
        raise ValueError(f"{type(model).__name__} is not enabled; call sightline.hf.enable(model) first")
    if not any(NOTE in vars(layer) for layer in layers):
        _run_once(model)
    return [layer for layer in layers if NOTE in vars(layer)]


def _run_once(model: nn.Module) -> None:
    device = next(model.parameters()).device
    with evaluation(model), torch.no_grad():
        model(input_ids=torch.arange(PROBE_LENGTH, device=device)[None], use_cache=False)
