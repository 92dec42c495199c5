"""What a family is: one value, at the end of its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sightline.config.recipes import RecipeTemplate
from sightline.models.decoder import Decoder
from sightline.models.hf.format import HuggingFace


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """Models of one kind and of many sizes, with all that commands know of them."""

    name: str
    """The FAMILY of FAMILY-SIZE."""
    model: type[Decoder]
    """The class of the model, built as model(config, attention_backend=...)."""
    config: type
    """The class of its config, a frozen dataclass that belongs to no other family."""
    presets: Mapping[str, Any] = field(default_factory=dict)
    """Configs by SIZE."""
    hf: HuggingFace | None = None
    """How its models are written in Hugging Face directories; None where there is nothing like them."""
    recipes: Mapping[str, RecipeTemplate] = field(default_factory=dict)
    """How each of the presets is trained, by SIZE."""

    def config_from_hf(self, hf: dict[str, Any]) -> Any:
        """The config of a model from the fields of its config.json. ValueError for what our model does not do."""
        assert self.hf is not None, "only a family with a format is looked for in Hugging Face directories"
        return self.config(**self.hf.config_from_hf(hf))
