"""Feed-forward layer."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sightline.layers.base import TensorParallelLayer
from sightline.layers.linear import Linear


class SwiGLU(TensorParallelLayer):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    SHARD_DIMS: ClassVar = {"gate": 0, "up": 0, "down": 1}

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate = Linear(hidden_size, intermediate_size, bias=False)
        self.up = Linear(hidden_size, intermediate_size, bias=False)
        self.down = Linear(intermediate_size, hidden_size, bias=False)

    def init_weights(self, std: float, output_std: float) -> None:
        for linear in (self.gate, self.up):
            nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(self.down.weight, std=output_std)

    def tensor_parallel_units(self) -> dict[str, int]:
        return {"channels of a feed-forward layer": self.gate.out_features}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., W] -> [..., W]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))
