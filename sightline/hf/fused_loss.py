"""Fused output projection and cross-entropy for the causal language models of transformers."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from sightline.hf.chunked_logits import ChunkedLogits
from sightline.hf.trl_private import replace_log_probs, restore_log_probs
from sightline.precision import autocast_dtype
from sightline.torch_private import disable_compiler, is_dtensor

_computes_loss: ContextVar[bool] = ContextVar("computes_loss", default=False)
"""Whether the forward that runs was given labels."""


class ChunkedHead(nn.Linear):
    """Output head that returns `ChunkedLogits` in a forward with labels and gradients, and else the logits."""

    @disable_compiler
    def forward(self, hidden: Tensor) -> Any:
        if not (_computes_loss.get() and torch.is_grad_enabled()):
            return super().forward(hidden)
        if isinstance(self, FSDPModule) or is_dtensor(self.weight):
            raise ValueError(
                "the fused loss needs the whole weight of the output head until the end of the model's forward, which "
                "fully_shard(model.lm_head) and tensor parallelism do not keep; shard the head with the root module, "
                "fully_shard(model), or call sightline.hf.enable(model, fused_loss=False)"
            )
        dtype = autocast_dtype(hidden) or hidden.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return ChunkedLogits(hidden.to(dtype), self.weight.to(dtype), bias)


def enable_fused_loss(model: PreTrainedModel) -> None:
    """Compute the loss of a causal language model in chunks of tokens, so that the logits of all tokens never exist.

    In a forward with `labels` as a keyword argument and with gradients, the output head returns `ChunkedLogits`, whose
    cross-entropy is `linear_cross_entropy`. The model's own code runs unchanged, with its soft caps, scales and
    auxiliary losses. `outputs.logits` is then a `ChunkedLogits`. Every other forward is as before.

    TRL's trainers compute the loss from the weight of the head; import them first, and they use the same kernels.

    Raises:
        ValueError: if the output head is not an `nn.Linear`, or something has changed its forward.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, ChunkedHead):
        _check(model, head)
        head.__class__ = ChunkedHead
        forward: Any = model.forward
        model.forward = types.MethodType(_announces_labels(forward.__func__), model)
    replace_log_probs(model)


def disable_fused_loss(model: PreTrainedModel) -> None:
    """Undo `enable_fused_loss`. A forward that others have wrapped since then stays, and does nothing of its own."""
    restore_log_probs(model)
    head = model.get_output_embeddings()
    if type(head) is ChunkedHead:
        head.__class__ = nn.Linear  # type: ignore[assignment]
    forward: Any = getattr(vars(model).get("forward"), "__func__", None)
    if hasattr(forward, "without_fused_loss"):
        del model.forward
        if forward.without_fused_loss is not type(model).forward:
            model.forward = types.MethodType(forward.without_fused_loss, model)


def _announces_labels(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward`, a function of the model and its arguments, which tells the head whether labels were given.

    It does not refer to the model, so that a deep copy of the model calls its own forward.
    """

    @functools.wraps(forward)
    def with_labels(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        token = _computes_loss.set(kwargs.get("labels") is not None)
        try:
            return forward(model, *args, **kwargs)
        finally:
            _computes_loss.reset(token)

    with_labels.without_fused_loss = forward  # type: ignore[attr-defined]
    return with_labels


def _check(model: PreTrainedModel, head: nn.Module | None) -> None:
    if type(head) is not nn.Linear:
        kind = f"{type(head).__module__}.{type(head).__qualname__}"
        raise ValueError(
            f"the output head of {type(model).__name__} is {kind}, and the fused loss needs a plain torch.nn.Linear; "
            "leave the head out of PEFT's target_modules, of quantization and of fully_shard (enable the fused loss "
            "before PEFT wraps the head by modules_to_save), or call sightline.hf.enable(model, fused_loss=False)"
        )
    if "forward" in vars(head) or head._forward_hooks or not hasattr(model.forward, "__func__"):
        raise ValueError(
            f"the output head of {type(model).__name__} has hooks (of device_map or tensor parallelism), which need "
            "its logits; call sightline.hf.enable(model, fused_loss=False)"
        )
