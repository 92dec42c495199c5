"""Masks of all layer types of a model before it runs, for context parallelism and torch.compile."""

from __future__ import annotations

import torch
from torch import nn

from sightline.hf.attention import IS_ENABLED, RULE
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
    layers = [module for module in model.modules() if getattr(module, IS_ENABLED, False)]
    if not layers:
        raise ValueError(f"{type(model).__name__} is not enabled; call sightline.hf.enable(model) first")
    if not any(RULE in vars(layer) for layer in layers):
        _run_once(model)
    rules: dict[str, Rule] = {}
    for layer in layers:
        rule = vars(layer).get(RULE)
        if rule is None:
            continue
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


def build_masks(model: nn.Module, documents: Documents) -> dict[str, AttentionMask]:
    """Return the mask of each layer type of an enabled model, [B, S, S] on the CPU, for these documents."""
    rows, length = documents.ids.shape
    index = torch.arange(length).expand(rows, -1)
    tokens = Tokens(index, length, 0, documents.index_in_document, documents.positions)
    return {name: rule.mask(tokens) & documents.mask for name, rule in layer_rules(model).items()}


@torch.no_grad()
def _run_once(model: nn.Module) -> None:
    device = next(model.parameters()).device
    tokens = torch.arange(PROBE_LENGTH, device=device)[None]
    training = model.training
    model.eval()
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        model.train(training)
