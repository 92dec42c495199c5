"""Activation recompute: the backward computes again what the forward has not kept."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from sightline.config import TrainingConfig
from sightline.layers import Router, routers_of
from sightline.parallel.patch import replace_forward
from sightline.parallel.torch_private import ATTENTION_OPS, GROUPED_MM, RECEIVING_OPS

ops = torch.ops.aten
SAVED_OPS: list[Any] = [
    *(ops.mm.default, ops.addmm.default, ops.bmm.default, ops.baddbmm.default, GROUPED_MM),
    *ATTENTION_OPS,
    *RECEIVING_OPS,  # what other processes have sent or summed need not be sent again
]
"""The operations whose results `selective` keeps: those that take long for the memory of what they return.

On a CPU the products of experts are not among them: they are written straight into their place.
"""


def apply_recompute(model: nn.Module, training: TrainingConfig) -> None:
    """Let layers number 0, n, 2n, ... keep no more of a forward than `training.recompute` says, n being its
    `recompute_every`: layers of the decoder and of an encoder each counted by themselves, over all pipeline stages.

    DeepSeek's extra layer for the token after the next is in no list of layers, and keeps all it has.
    """
    if training.recompute == "none":
        return
    selective = training.recompute == "selective"
    for module in model.modules():
        if isinstance(module, nn.ModuleDict | nn.ModuleList):
            for number, layer in module.named_children():
                if int(number) % training.recompute_every == 0:
                    recompute(layer, selective)


def recompute(layer: nn.Module, selective: bool) -> None:
    """Let one layer compute its forward again in the backward."""
    routers = list(routers_of(layer).values())
    # Nothing in a layer is random.
    compiled: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        compiled["context_fn"] = functools.partial(create_selective_checkpoint_contexts, SAVED_OPS)
    eager = compiled
    if routers:
        contexts = compiled.get("context_fn", noop_context_fn)

        def count_once() -> tuple[Any, AbstractContextManager]:
            forward, again = contexts()
            return forward, _RestoreRouterState(routers, again)

        eager = {**compiled, "context_fn": count_once}

    def wrap(run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any) -> Any:
            # A compiler takes no other contexts; `apply_compile` tells it to count once.
            return checkpoint(run, *args, **(compiled if torch.compiler.is_compiling() else eager))

        return forward

    replace_forward(layer, wrap)


class _RestoreRouterState(AbstractContextManager):
    """The context, behind which the routers know what they knew before it. A pipeline that computes the gradients of
    the weights apart enters it twice."""

    def __init__(self, routers: list[Router], context: AbstractContextManager) -> None:
        self.routers, self.context = routers, context

    def __enter__(self) -> None:
        self.known = [(router, router.counts, router.aux_loss) for router in self.routers]
        self.context.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        for router, counts, aux_loss in self.known:
            router.counts, router.aux_loss = counts, aux_loss
        return self.context.__exit__(*error)
