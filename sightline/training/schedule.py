"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from sightline import config


def learning_rate(step: int, options: config.OptimizerConfig, steps: int) -> float:
    """Learning rate of `step`, counted from 1 to `steps`.

    It rises in a straight line and is at its peak in step `warmup_steps`; the last step has `min_lr_ratio` of it.
    """
    peak, warmup = options.learning_rate, options.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    begin = max(warmup, steps - round(options.decay_ratio * steps)) if options.schedule == "wsd" else warmup
    if step <= begin or steps <= begin:
        return peak
    done = min(1.0, (step - begin) / (steps - begin))  # 0 at the end of the plateau, 1 in the last step
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if options.schedule == "cosine" else 1.0 - done
    return peak * (options.min_lr_ratio + (1.0 - options.min_lr_ratio) * left)
