"""The feed-forward layer."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sightline.layers.facts import Divisible


class SwiGLU(Divisible):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    SHARDED: ClassVar = {"gate": 0, "up": 0, "down": 1}

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, ffn, bias=False)
        self.up = nn.Linear(width, ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def init_weights(self, std: float, output_std: float) -> None:
        for linear in (self.gate, self.up):
            nn.init.normal_(linear.weight, std=std)
        nn.init.normal_(self.down.weight, std=output_std)

    def parts(self) -> dict[str, int]:
        return {"channels of a feed-forward layer": self.gate.out_features}

    def forward(self, x: Tensor) -> Tensor:
        """x [..., W] -> [..., W]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))
