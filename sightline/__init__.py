"""Sightline: train language models on packed documents. Attention masks are data."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sightline.batch import Batch
    from sightline.training.loading import LoadedModel, load
    from sightline.training.trainer import train

__version__ = "0.2.0"
__all__ = ["Batch", "LoadedModel", "__version__", "load", "train"]

MODULES = {
    "Batch": "sightline.batch",
    "LoadedModel": "sightline.training.loading",
    "load": "sightline.training.loading",
    "train": "sightline.training.trainer",
}
"""Module of each public name."""


def __getattr__(name: str) -> Any:
    """Import the module of a public name on first use: `import sightline` alone does not even import torch."""
    if name not in MODULES:
        raise AttributeError(f"module 'sightline' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(MODULES[name]), name)
