"""AdamW with its decay groups, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from sightline import config


def build_optimizer(model: nn.Module, options: config.Optimizer) -> AdamW:
    """Fused AdamW over every parameter once. Matrices decay; norms, biases and other vectors do not.

    A tied weight is one parameter with two names: `parameters()` gives it once. The moments exist from the start,
    so a checkpoint has one shape whether a step was taken or not.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW(
        [group for group in groups if group["params"]],
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


def optimizer_state(model: nn.Module, optimizer: AdamW) -> dict[str, dict[str, Tensor]]:
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
