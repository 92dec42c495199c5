"""Enable each model that is loaded by the name "sightline", for programs whose code cannot call `enable`."""

from __future__ import annotations

import functools
import os
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sightline.hf.enable import NAME, enable


def enable_on_load() -> None:
    """Let `from_pretrained` pass every model that it loads with attn_implementation="sightline" to `enable`."""
    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    @functools.wraps(load)
    def load_and_enable(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        loaded = load(cls, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # output_loading_info=True returns both
        if model.config.get_text_config(decoder=True)._attn_implementation == NAME:
            enable(model, check=_can_run(model))
        return loaded

    PreTrainedModel.from_pretrained = classmethod(load_and_enable)  # type: ignore[assignment]


def _can_run(model: nn.Module) -> bool:
    """Return whether this process has the weights: FSDP loads them on one rank, and ZeRO-3 keeps a part on each."""
    first_rank = os.environ.get("RANK", "0") == "0"
    return first_rank and not any(weight.is_meta or not weight.numel() for weight in model.parameters())
