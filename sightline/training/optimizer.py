"""AdamW with its decay groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from sightline import config


class Model(Protocol):
    """A model, or the part of one that this process has."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """A tied weight has two names, and comes once."""
        ...


def build_optimizer(model: Model, options: config.Optimizer) -> AdamW:
    """Fused AdamW over every parameter once. Matrices decay; norms, biases and other vectors do not.

    The moments exist from the start,
    so a checkpoint has one shape whether a step was taken or not.
    """
    parameters = [p for _, p in model.named_parameters() if p.requires_grad]
    # One kernel takes many tensors at a time, but only of one mesh: experts lie on another than the rest.
    groups: dict[tuple[bool, Any], list[nn.Parameter]] = defaultdict(list)
    for p in parameters:
        groups[p.ndim >= 2, p.device_mesh if isinstance(p, DTensor) else None].append(p)
    optimizer = AdamW(
        [
            {"params": group, "weight_decay": options.weight_decay if decays else 0.0}
            for (decays, _), group in groups.items()
        ],
        lr=options.learning_rate,
        betas=options.betas,
        eps=options.eps,
        fused=True,
    )
    for p in parameters:
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
        }
    return optimizer


def optimizer_state(model: Model, optimizer: AdamW) -> dict[str, dict[str, Tensor]]:
    """The moments by parameter name. Options (learning rate, decay) belong to the config and are not among them."""
    return {name: optimizer.state[p] for name, p in model.named_parameters() if p.requires_grad}


def learning_rate(step: int, options: config.Optimizer, steps: int) -> float:
    """Learning rate of `step`, counted from 1 to `steps`.

    It rises in a straight line and is at its peak in step `warmup_steps`; the last step has `final_share` of it.
    """
    peak, warmup = options.learning_rate, options.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    begin = max(warmup, steps - round(options.decay_share * steps)) if options.schedule == "wsd" else warmup
    if step <= begin or steps <= begin:
        return peak
    done = min(1.0, (step - begin) / (steps - begin))  # 0 at the end of the plateau, 1 in the last step
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if options.schedule == "cosine" else 1.0 - done
    return peak * (options.final_share + (1.0 - options.final_share) * left)
