"""torch.compile, layer by layer: layers of one class share what is compiled for the first."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sightline.models.block import Layer
from sightline.parallel.patch import replace_forward
from sightline.parallel.torch_private import skip_side_effects_of_recompute


def apply_compile(model: nn.Module, *, backend: str = "inductor") -> None:
    """Compile the decoder's layers in place, after all that changes what a layer computes and before FSDP.

    What a mask shows is data, so other documents compile nothing. What does, once each: another length of rows, a
    forward without gradients, and with experts a step's second forward (the first finds no counts to add to).

    Never compiled, so that a layer falls into several graphs: tiled attention, the products of experts one by one (on
    a CPU, and in float32 everywhere), the all-to-all of tokens. A recomputed layer with one of them in it is not
    compiled at all.
    """
    # The routers of a compiled layer that is computed again do not count again.
    skip_side_effects_of_recompute()
    for module in model.modules():
        if isinstance(module, Layer):
            replace_forward(module, functools.partial(compile_forward, backend))


def compile_forward(backend: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile what a layer does with whole rows. A cache grows with each token: nothing compiled would fit the next.

    `nn.Module.compile` would compile the calls with a cache too.
    """
    compiled = torch.compile(run, backend=backend)

    def forward(h: Tensor, mask: Any, encoding: Any, cache: Any = None) -> Tensor:
        return compiled(h, mask, encoding) if cache is None else run(h, mask, encoding, cache)

    return forward
