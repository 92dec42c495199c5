"""Learning rate schedules."""

from __future__ import annotations

import math

from sightline import config


def learning_rate(step: int, options: config.OptimizerConfig, steps: int) -> float:
    """Return the learning rate of `step`, counted from 1 to `steps`.

    It rises linearly to its peak at step `warmup_steps`, and is `min_lr_ratio` times the peak at the last step.
    """
    peak, warmup = options.learning_rate, options.warmup_steps
    if step <= warmup:
        return peak * step / warmup
    start = max(warmup, steps - round(options.decay_ratio * steps)) if options.schedule == "wsd" else warmup
    if step <= start or steps <= start:
        return peak
    progress = min(1.0, (step - start) / (steps - start))  # 0 at the end of the plateau, 1 at the last step
    factor = 0.5 * (1.0 + math.cos(math.pi * progress)) if options.schedule == "cosine" else 1.0 - progress
    return peak * (options.min_lr_ratio + (1.0 - options.min_lr_ratio) * factor)
