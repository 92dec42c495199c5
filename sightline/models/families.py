"""The list of families, and the lookups derived from it."""

from __future__ import annotations

import sys
from typing import Any

import torch

from sightline.models.deepseek_v3 import DEEPSEEK_V3
from sightline.models.family import Family
from sightline.models.gpt_oss import GPT_OSS
from sightline.models.llama3 import LLAMA3
from sightline.models.llama4 import LLAMA4
from sightline.models.qwen3 import QWEN3
from sightline.models.qwen3_next import QWEN3_NEXT
from sightline.models.vlm import VLM_FAMILY
from sightline.models.weight_init import init_model_weights

FAMILIES: tuple[Family, ...] = (LLAMA3, LLAMA4, QWEN3, QWEN3_NEXT, DEEPSEEK_V3, GPT_OSS, VLM_FAMILY)

MODELS: dict[str, Any] = {
    f"{family.name}-{size}": config for family in FAMILIES for size, config in family.presets.items()
}
"""The configs of all named sizes: FAMILY-SIZE."""


def config_of(name: str) -> Any:
    """The config of a named size: `llama3-tiny`, `llama3-8b`, ..."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; the models are: {', '.join(MODELS)}")
    return MODELS[name]


def family_of(config: Any) -> Family:
    """The family of a model's config: one of FAMILIES, or the `Family` in the module that defines the config's class.

    Raises:
        ValueError: where there is none.
    """
    return _find(config)[1]


def reference_of(config: Any) -> str:
    """The family of a config as a string, for files: `llama3`, or `package.module:NAME` for one from outside."""
    return _find(config)[0]


def _find(config: Any) -> tuple[str, Family]:
    kind = type(config)
    outside = ((f"{kind.__module__}:{name}", value) for name, value in _values(kind.__module__).items())
    for reference, family in (*((family.name, family) for family in FAMILIES), *outside):
        if isinstance(family, Family) and family.config is kind:
            return reference, family
    raise ValueError(
        f"{kind.__module__}.{kind.__qualname__} is the config of no family. A family is a value "
        f"Family(name=..., model=..., config={kind.__name__}, ...) in the module that defines the class of its config, "
        f"here {kind.__module__}; or one of {', '.join(family.name for family in FAMILIES)}"
    )


def named_family(reference: str) -> Family | None:
    """The family of `reference_of`, or None for one that is not known to this process.

    Looks at modules that are imported, and imports none: a reference comes out of a file, and a file must not decide
    what code runs.
    """
    known = {family.name: family for family in FAMILIES}
    module, _, name = reference.partition(":")
    value = _values(module).get(name) if name else known.get(reference)
    return value if isinstance(value, Family) else None


def _values(module: str) -> dict[str, Any]:
    """What an imported module defines. Read without getattr, with which some modules import others."""
    return dict(getattr(sys.modules.get(module), "__dict__", {}))


def build_skeleton(name_or_config: Any, *, attention_backend: str = "auto") -> Any:
    """A model on the meta device, without memory for its weights: `model.to_empty(device=...)`, then `init_model_weights`."""
    config = config_of(name_or_config) if isinstance(name_or_config, str) else name_or_config
    with torch.device("meta"):
        return family_of(config).model(config, attention_backend=attention_backend)


def build_model(name_or_config: Any, *, attention_backend: str = "auto") -> Any:
    """A model with fresh weights on the default device; `torch.manual_seed` before it decides them.

    name_or_config  a name in MODELS, or the config of a family
    """
    model = build_skeleton(name_or_config, attention_backend=attention_backend)
    model.to_empty(device=torch.get_default_device())
    init_model_weights(model)
    return model
