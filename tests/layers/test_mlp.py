import math

import torch

from sightline.layers import SwiGLU


def test_swiglu_literal() -> None:
    mlp = SwiGLU(hidden_size=1, intermediate_size=1)
    with torch.no_grad():
        mlp.gate.weight.fill_(2.0)
        mlp.up.weight.fill_(3.0)
        mlp.down.weight.fill_(5.0)
    expected = 5.0 * (2.0 / (1.0 + math.exp(-2.0))) * 3.0  # down * silu(gate) * up of x = 1
    torch.testing.assert_close(mlp(torch.ones(1, 1)), torch.tensor([[expected]]))
    assert {name: tuple(p.shape) for name, p in SwiGLU(3, 7).named_parameters()} == {
        "gate.weight": (7, 3),
        "up.weight": (7, 3),
        "down.weight": (3, 7),
    }
