"""Models: one file each, read top to bottom. `MODELS` names their sizes."""

from __future__ import annotations

import torch

from sightline.models.llama3 import LLAMA3_SIZES, Llama3, Llama3Config, Llama3RopeScaling

__all__ = ["MODELS", "Llama3", "Llama3Config", "Llama3RopeScaling", "build_model", "config_of"]

MODELS: dict[str, Llama3Config] = {f"llama3-{size}": config for size, config in LLAMA3_SIZES.items()}


def config_of(name: str) -> Llama3Config:
    """The config of a named size: `llama3-tiny`, `llama3-8b`, ..."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; the models are: {', '.join(MODELS)}")
    return MODELS[name]


def build_model(name_or_config: str | Llama3Config, *, attention_backend: str = "auto") -> Llama3:
    """A model with fresh weights on the default device; `torch.manual_seed` before it decides them.

    Under `torch.device("meta")` nothing is allocated: place the model with `model.to_empty(device=...)`, then call
    `model.init_weights()`. That gives the very weights this function gives directly.
    """
    config = config_of(name_or_config) if isinstance(name_or_config, str) else name_or_config
    device = torch.get_default_device()
    with torch.device("meta"):  # so that no weight is drawn twice, and the seed is spent on init_weights alone
        model = Llama3(config, attention_backend=attention_backend)
    model.to_empty(device=device)
    model.init_weights()
    return model
