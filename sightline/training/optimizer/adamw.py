"""AdamW (arXiv 1711.05101), fused."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sightline import config
from sightline.layers.base import ParameterInfo


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with weight decay for matrices, embedding and output projection, not for norms and biases."""

    found_inf: Tensor | None = None

    def __init__(self, parameters: list[ParameterInfo], options: config.OptimizerConfig) -> None:
        # The fused kernel needs one device mesh per group, and experts have another mesh than the other parameters.
        groups: dict[tuple[bool, Any], list[nn.Parameter]] = defaultdict(list)
        for _, p, role in parameters:
            groups[role.decays, p.device_mesh if isinstance(p, DTensor) else None].append(p)
        decay = {True: options.weight_decay, False: 0.0}
        super().__init__(
            [{"params": group, "weight_decay": decay[decays]} for (decays, _), group in groups.items()]
            or [{"params": []}],  # torch requires a group, but Muon may leave AdamW no parameters
            lr=options.learning_rate,
            betas=options.betas,
            eps=options.eps,
            fused=True,
        )
        for _, p, _ in parameters:
            self.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
            }
