"""Check that a model can run on a part of the tokens of its rows, as context parallelism needs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from sightline.hf.calls import name_of, position_start, transformers_model
from sightline.hf.check import evaluation
from sightline.hf.documents import CONTEXT, Documents
from sightline.hf.layer_masks import build_masks
from sightline.hf.running import set_documents
from sightline.masks import AttentionMask

LENGTHS = (9, 7)
"""Tokens of the documents of the row on which a model is tried."""

_PASSED: WeakSet[nn.Module] = WeakSet()


def check_divisible(model: nn.Module, batch: Mapping[str, Any], length: int) -> None:
    """Check that only attention relates tokens to each other, and that a loss is a sum over tokens.

    The model runs once on a short row and once on the same tokens in another order, with the same positions and masks
    that connect the same tokens: each token must have the same logits.

    length  S of the rows

    Raises:
        ValueError: if the model cannot be divided.
    """
    root = transformers_model(model)
    config, name = root.config.get_text_config(decoder=True), name_of(root)
    scale = getattr(config, "floor_scale", None)
    if getattr(config, "attn_temperature_tuning", None) and scale and length >= scale:
        raise ValueError(
            f"{name}: attn_temperature_tuning scales queries by their index in the row from index {scale} on, and a "
            f"rank's tokens have other indices; use rows shorter than {scale}, got {length}"
        )
    asked = batch.get("output_router_logits", getattr(config, "output_router_logits", False))
    if asked and getattr(config, "router_aux_loss_coef", 1.0):
        raise ValueError(
            f"{name}: the auxiliary loss of its routers is no sum over tokens, so that it cannot be divided; set "
            "config.output_router_logits=False, or router_aux_loss_coef=0"
        )
    if model not in _PASSED:
        _check_token_order(model, root, name)
        _PASSED.add(model)


def _check_token_order(model: nn.Module, root: PreTrainedModel, name: str) -> None:
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None].int()
    tokens = torch.arange(ids.shape[1])[None]
    order = tokens[0].view(4, -1).T.flatten()  # 0, 4, 8, ...
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None] + position_start(root)
    inputs = {"input_ids": tokens, "position_ids": positions}
    has_loss = "labels" in inspect.signature(root.forward).parameters
    if has_loss:
        inputs |= {"labels": tokens, "shift_labels": tokens}
    masks = build_masks(model, Documents(ids, CONTEXT))
    results = [_run(model, inputs, ids, masks, permutation) for permutation in (tokens[0], order)]
    first, second = (result.get("logits", result[0]).float() for result in results)
    # The median over tokens, since rounding may send a few tokens to other experts.
    change = (first[:, order] - second).norm(dim=-1) / first[:, order].norm(dim=-1).clamp(min=1e-20)
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1
    if float(change.median()) > tolerance:
        raise ValueError(
            f"{name}: the logits of a token depend on the order of the row's tokens by {float(change.median()):.1e}, "
            "even with given positions and masks: a layer other than attention relates tokens, or the model ignores "
            "position_ids. Context parallelism cannot divide its rows"
        )
    if has_loss:
        _check_loss(results[0].loss, first, tokens.to(first.device), tolerance, name)


def _check_loss(loss: Tensor, logits: Tensor, labels: Tensor, tolerance: float, name: str) -> None:
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (2 * labels.numel())
    if abs(float(loss) - float(expected)) > tolerance * float(expected):
        raise ValueError(
            f"{name}: its loss is {float(loss):.6f}, but the cross-entropy of its logits with shift_labels, divided by "
            f"num_items_in_batch, is {float(expected):.6f}: the sum over ranks would be wrong. Compute the loss from "
            "the logits, and pass no labels"
        )


def _run(
    model: nn.Module, inputs: dict[str, Tensor], ids: Tensor, masks: dict[str, AttentionMask], order: Tensor
) -> Any:
    """Return the output of a model for the tokens in this order, with a loss that is divided by twice their number."""
    device = next(model.parameters()).device
    local: dict[str, Any] = {name: value[:, order].to(device) for name, value in inputs.items()}
    if "labels" in local:
        local["num_items_in_batch"] = torch.tensor(2 * len(order), device=device)
    dense = {name: mask.to_dense()[:, order][:, :, order] for name, mask in masks.items()}
    permuted = {name: AttentionMask.from_dense(mask) for name, mask in dense.items()}
    with set_documents(Documents(ids[:, order], CONTEXT, masks=permuted)), evaluation(model), torch.no_grad():
        return model(**local, use_cache=False)
