"""`Family`: everything the package needs to know about a model architecture, as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sightline.config.recipes import RecipeTemplate
from sightline.models.decoder import Decoder
from sightline.models.hf.format import HuggingFace


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A model architecture: model class, config class, named presets, Hugging Face format and recipes."""

    name: str
    """Name of the family, the FAMILY in model names FAMILY-SIZE."""
    model: type[Decoder]
    """Model class, called as model(config, attention_backend=...)."""
    config: type
    """Config class, a frozen dataclass that no other family uses."""
    presets: Mapping[str, Any] = field(default_factory=dict)
    """{SIZE: config} of the named models."""
    hf: HuggingFace | None = None
    """Conversion from and to Hugging Face directories; None if transformers has no such architecture."""
    recipes: Mapping[str, RecipeTemplate] = field(default_factory=dict)
    """{SIZE: recipe template}: how each preset is trained."""

    def config_from_hf(self, hf: dict[str, Any]) -> Any:
        """Return the model config for the fields of a config.json.

        Raises:
            ValueError: if config.json asks for a feature that the model does not support.
        """
        assert self.hf is not None, "find_family returns only families with a Hugging Face format"
        return self.config(**self.hf.config_from_hf(hf))
