"""torch.compile, layer by layer: layers of one class share what is compiled for the first."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sightline.models.decoder import Layer


def apply_compile(model: nn.Module, *, backend: str = "inductor") -> None:
    """Compile the decoder's layers in place, after all that changes what a layer computes and before FSDP.

    What a mask shows is data, so other documents compile nothing. What does, once each: another length of rows, a
    forward without gradients, and with experts a step's second forward (the first finds no counts to add to).

    Never compiled, so that a layer falls into several graphs there:
        attention tile by tile, and the products of experts one by one: on a CPU, the latter in float32 everywhere
        the journey of tokens to experts that lie on several processes
    A layer that is recomputed and has one of them in it is not compiled at all.
    """
    # The routers of a compiled layer that is computed again do not count again.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    for module in model.modules():
        if isinstance(module, Layer):
            compile_layer(module, backend)


def compile_layer(layer: Layer, backend: str) -> None:
    """Compile what a layer does with whole rows. A cache grows with each token: nothing compiled would fit the next."""
    run, compiled = layer.forward, torch.compile(layer.forward, backend=backend)

    def forward(h: Tensor, mask: Any, encoding: Any, cache: Any = None) -> Tensor:
        return compiled(h, mask, encoding) if cache is None else run(h, mask, encoding, cache)

    layer.forward = forward  # type: ignore[method-assign]
