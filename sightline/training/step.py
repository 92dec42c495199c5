"""One optimizer step: what the model takes, the loss over all valid tokens, clipping, the update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from sightline.batch import PADDING, Batch
from sightline.data import Tokenizer
from sightline.masks import AttentionMask

Model = Any
"""A model of sightline.models. It has no type of its own: every family is just an nn.Module with the same few methods,
and nn.Module declares whatever it does not know a Tensor."""
Masks = AttentionMask | dict[str, AttentionMask]


def prepare_batch(
    model: Model, batch: Batch, tokenizer: Tokenizer | None, device: torch.device | str
) -> dict[str, Any]:
    """What the model's forward takes, by name: tokens, labels, attention_masks, positions and the batch's extra.

    Training, validation and every tool come through here, so none of them can have another mask than the others.
    The masks are made from the batch on the CPU, where their few integers cost next to nothing, and then moved.
    """
    masks = model.get_attention_masks(batch, tokenizer)
    moved = batch.to(device)
    return {
        "tokens": moved.tokens,
        "labels": moved.labels,
        "positions": moved.positions,
        "attention_masks": {name: mask.to(device) for name, mask in masks.items()}
        if isinstance(masks, dict)
        else masks.to(device),
        **moved.extra,
    }


def named_masks(masks: Masks) -> dict[str, AttentionMask]:
    """The masks by name; a single one is called `attention`."""
    return masks if isinstance(masks, dict) else {"attention": masks}


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """bfloat16 where the run wants it; in float32 it does nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Numbers of one step. The tensors stay on the device: reading one waits for it."""

    loss: Tensor
    """float32 scalar: mean over the step's valid tokens."""
    grad_norm: Tensor
    """float32 scalar: before clipping."""
    visible_pairs: Tensor
    """int64 scalar: (query, key) pairs all masks show."""
    attention_flops: Tensor
    """float64 scalar: forward and backward of those pairs over all layers."""
    tokens: int
    """Tokens that are no padding."""
    fill: float
    """Their share of the rows."""
    of_model: dict[str, Tensor]
    """Scalars that the model tells of the step, by name: the load of its experts, ..."""


def train_step(
    model: Model,
    optimizer: AdamW,
    batch: Batch,
    tokenizer: Tokenizer | None,
    *,
    micro_batch_size: int,
    max_grad_norm: float,
    device: torch.device,
    dtype: str = "float32",
) -> StepResult:
    """Take one step on all rows of `batch`, `micro_batch_size` at a time. The optimizer has its learning rate.

    The loss divides by the valid tokens of the whole batch, counted before the first forward, so the gradient does
    not depend on how the rows are cut into micro-batches. A step whose loss or gradient norm is not finite leaves
    weights and moments untouched.
    """
    optimizer.zero_grad(set_to_none=True)
    valid_tokens = max(1, batch.valid_tokens())
    loss = torch.zeros((), device=device)
    pairs = torch.zeros((), dtype=torch.int64, device=device)
    flops = torch.zeros((), dtype=torch.float64, device=device)
    for first in range(0, batch.shape[0], micro_batch_size):
        inputs = prepare_batch(model, batch[first : first + micro_batch_size], tokenizer, device)
        with autocast(device, dtype):
            share = model(**inputs) / valid_tokens
        share.backward()
        loss += share.detach()
        for name, mask in named_masks(inputs["attention_masks"]).items():
            visible = mask.visible_pairs().sum()
            pairs += visible
            flops += visible * flops_per_pair(model, name)
    grad_norm = clip_grad_norm_(model.parameters(), max_grad_norm)
    # The switch of torch.amp.GradScaler: the fused kernel reads it on the device and leaves everything as it was,
    # so nobody has to wait for the loss to know whether to step.
    optimizer.found_inf = (~(loss.isfinite() & grad_norm.isfinite())).float()  # type: ignore[attr-defined]
    optimizer.step()
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        visible_pairs=pairs,
        attention_flops=flops,
        tokens=int((batch.document_ids != PADDING).sum()),
        fill=batch.fill(),
        of_model=model.finish_step(),
    )


def flops_per_pair(model: Model, name: str) -> float:
    """Forward and backward FLOPs of one visible pair of the mask called `name`, over all layers that use it."""
    flops = model.attention_flops_per_pair()
    return flops[name] if isinstance(flops, dict) else flops
