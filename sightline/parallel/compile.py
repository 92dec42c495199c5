"""Per-layer torch.compile: all layers of one class share the graph compiled for the first."""

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
    """Compile the decoder's layers in place, after every change to a layer's forward and before FSDP.

    The contents of masks are data, so new documents cause no recompilation. One recompilation each is caused by another
    sequence length, by a forward without gradients, and, with experts, by the second forward of a step (in the first,
    the routers have no counts to add to).

    The tiled attention backend, the loop over experts (on a CPU, and in float32 on any device) and the all-to-all of
    tokens are never compiled: they break the layer's graph. A recomputed layer with a graph break runs eagerly.
    """
    # Otherwise the routers of a compiled layer would count again when the backward recomputes the layer.
    skip_side_effects_of_recompute()
    for module in model.modules():
        if isinstance(module, Layer):
            replace_forward(module, functools.partial(compile_forward, backend))


def compile_forward(backend: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a forward that is compiled, except for calls with a cache: a cache grows with each generated token.

    `nn.Module.compile` would compile the calls with a cache too.
    """
    compiled = torch.compile(run, backend=backend)

    def forward(h: Tensor, mask: Any, encoding: Any, cache: Any = None) -> Tensor:
        return compiled(h, mask, encoding) if cache is None else run(h, mask, encoding, cache)

    return forward
