"""A model family as one value, which stands at the end of the family's file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sightline.config.recipes import RecipeTemplate
from sightline.models.decoder import Decoder
from sightline.models.hf.format import HuggingFace


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """All models of one architecture: the classes, the named sizes, the Hugging Face format and the recipes."""

    name: str
    """The FAMILY of FAMILY-SIZE."""
    model: type[Decoder]
    """The class of the model, built as model(config, attention_backend=...)."""
    config: type
    """The class of its config, a frozen dataclass that belongs to no other family."""
    presets: Mapping[str, Any] = field(default_factory=dict)
    """Configs by SIZE."""
    hf: HuggingFace | None = None
    """The format of its models in Hugging Face directories; None for an architecture that has none there."""
    recipes: Mapping[str, RecipeTemplate] = field(default_factory=dict)
    """How each of the presets is trained, by SIZE."""

    def config_from_hf(self, hf: dict[str, Any]) -> Any:
        """The config of a model from the fields of its config.json. ValueError for what our model does not do."""
        assert self.hf is not None, "only a family with a format is looked for in Hugging Face directories"
        return self.config(**self.hf.config_from_hf(hf))
