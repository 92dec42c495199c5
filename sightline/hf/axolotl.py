"""Plugin of axolotl, whose configuration does not accept the attention name: it enables the model after loading."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from torch import nn

from sightline.hf.on_load import enable_loaded


class SightlinePlugin(BasePlugin):
    """Plugin for `plugins: [sightline.hf.axolotl.SightlinePlugin]`."""

    def post_model_load(self, cfg: Any, model: nn.Module) -> None:
        """Enable the model, with its adapters."""
        enable_loaded(model)
