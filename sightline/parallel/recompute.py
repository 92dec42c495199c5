"""Activation recomputation (checkpointing): the backward recomputes what the forward has not saved."""

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
from sightline.parallel.torch_private import (
    ATTENTION_OPS,
    GROUPED_MM,
    RECEIVING_OPS,
    ignore_profiler_ops_of_recompute,
)
from sightline.torch_private import ONEDNN_OPS

ops = torch.ops.aten
SAVED_OPS: list[Any] = [
    *(ops.mm.default, ops.addmm.default, ops.bmm.default, ops.baddbmm.default, GROUPED_MM, *ONEDNN_OPS),
    *ATTENTION_OPS,
    *RECEIVING_OPS,  # results of communication, which is then not repeated
]
"""Operations whose results `selective` saves: expensive ones, relative to the size of their results.

On a CPU, the matrix products of experts are not saved, since they write into a preallocated output.
"""


def apply_recompute(model: nn.Module, training: TrainingConfig) -> None:
    """Apply `training.recompute` to layers 0, n, 2n, ... in place, where n is `training.recompute_every`.

    Layers are numbered within the full model, over all pipeline stages, separately in the decoder and in an encoder.
    The layer of DeepSeek's multi-token prediction (MTP) module is in no module list and saves all its activations.
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
    """Replace a layer's forward by one that saves its inputs and is recomputed in the backward."""
    routers = list(routers_of(layer).values())
    # Layers use no random numbers, so their state need not be restored.
    compiled: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        ignore_profiler_ops_of_recompute()
        compiled["context_fn"] = functools.partial(create_selective_checkpoint_contexts, SAVED_OPS)
    eager = compiled
    if routers:
        contexts = compiled.get("context_fn", noop_context_fn)

        def count_once() -> tuple[Any, AbstractContextManager]:
            forward, recomputation = contexts()
            return forward, _RestoreRouterState(routers, recomputation)

        eager = {**compiled, "context_fn": count_once}

    def wrap(run: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any) -> Any:
            # The compiler supports no other contexts; `apply_compile` configures it to count once.
            return checkpoint(run, *args, **(compiled if torch.compiler.is_compiling() else eager))

        return forward

    replace_forward(layer, wrap)


class _RestoreRouterState(AbstractContextManager):
    """Wraps a context and restores the routers' counts and auxiliary losses when it exits.

    A pipeline schedule with split backward enters it twice.
    """

    def __init__(self, routers: list[Router], context: AbstractContextManager) -> None:
        self.routers, self.context = routers, context

    def __enter__(self) -> None:
        self.saved = [(router, router.counts, router.aux_loss) for router in self.routers]
        self.context.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        for router, counts, aux_loss in self.saved:
            router.counts, router.aux_loss = counts, aux_loss
        return self.context.__exit__(*error)
