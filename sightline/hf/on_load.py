"""Enable the models that other programs load, whose code cannot call `enable` itself."""

from __future__ import annotations

import functools
import os
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sightline.hf.enable import NAME, enable


def enable_loaded(model: nn.Module) -> None:
    """Enable a model, and check it where that is possible.

    It is not without weights, which FSDP can load on rank 0 only and of which ZeRO-3 keeps a part on each rank.
    """
    first_rank = os.environ.get("RANK", "0") == "0"
    has_weights = not any(weight.is_meta or not weight.numel() for weight in model.parameters())
    enable(model, check=first_rank and has_weights)


def enable_on_load() -> None:
    """Let `from_pretrained` enable every model that it loads with attn_implementation="sightline"."""
    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    @functools.wraps(load)
    def load_and_enable(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True returns both
        if model.config.get_text_config(decoder=True)._attn_implementation == NAME:
            enable_loaded(model)
        return loaded

    PreTrainedModel.from_pretrained = classmethod(load_and_enable)  # type: ignore[assignment]
