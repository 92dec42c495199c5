"""Private names of TRL, read here only. Tried with trl 1.16.0.

TRL's trainers of language models call `model(..., labels=labels, fused_lm_head=True)`, which computes the
log-probabilities in chunks from the weight of the output head, so the head's own forward does not run. That function
takes three times as long as `linear_log_probs` on a CPU, where it has no Triton kernel.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from sightline.layers.log_probs import linear_log_probs

_MODULE, _NAME = "trl.trainer.utils", "_ChunkedLogProbFunction"
_ARGUMENTS = ["hidden", "weight", "bias", "targets", "temperature", "chunk_size"]
_ARGUMENTS += ["final_logit_softcapping", "logit_scale", "outputs"]
_users: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models with the fused loss."""


def replace_log_probs(model: nn.Module) -> None:
    """Let TRL's fused output heads in this process compute with `linear_log_probs` on a CPU, with equal results.

    TRL's function does not know its model, so it is replaced for all models until `restore_log_probs` was called for
    each `model`. Nothing happens before TRL's trainers are imported, nor in a version whose function takes other
    arguments.
    """
    _users.add(model)
    module = sys.modules.get(_MODULE)
    theirs: Any = getattr(module, _NAME, None)
    if hasattr(theirs, "forward") and list(inspect.signature(theirs.forward).parameters)[1:] == _ARGUMENTS:
        setattr(module, _NAME, types.SimpleNamespace(apply=functools.partial(_log_probs, theirs), theirs=theirs))


def restore_log_probs(model: nn.Module) -> None:
    """Undo `replace_log_probs`."""
    _users.discard(model)
    module = sys.modules.get(_MODULE)
    if not _users and hasattr(getattr(module, _NAME, None), "theirs"):
        setattr(module, _NAME, getattr(module, _NAME).theirs)


def _log_probs(
    theirs: type[torch.autograd.Function],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    chunk_size: int,
    softcap: float | None,
    logit_scale: float,
    outputs: tuple[str, ...],
) -> tuple[Tensor | None, ...]:
    """Return log-probabilities, entropy, None, None and whether the target is the most likely token, as TRL's does."""
    if hidden.device.type != "cpu" or {"log_sum_sq_probs", "mean_logits"}.intersection(outputs):
        arguments = hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
        return theirs.apply(*arguments)
    plain = softcap is None and logit_scale == temperature
    transform = None if plain else functools.partial(_transform, softcap, logit_scale, temperature)
    log_probs, entropy, is_top1 = linear_log_probs(hidden, weight, targets, bias=bias, transform=transform)
    return log_probs, entropy if "entropy" in outputs else None, None, None, is_top1 if "is_top1" in outputs else None


def _transform(softcap: float | None, logit_scale: float, temperature: float, logits: Tensor) -> Tensor:
    if softcap is None:
        return logits * (logit_scale / temperature)
    return torch.tanh(logits * (logit_scale / softcap)) * (softcap / temperature)
