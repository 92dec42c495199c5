"""Registry of model families: lookup by name or config, and model construction."""

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
"""All named model configs by FAMILY-SIZE, such as `llama3-8b`."""


def config_of(name: str) -> Any:
    """Return the config of a named model, such as `llama3-tiny` or `llama3-8b`.

    Raises:
        ValueError: if there is no model of that name.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; the models are: {', '.join(MODELS)}")
    return MODELS[name]


def family_of(config: Any) -> Family:
    """Return the family of a config: one of FAMILIES, or the `Family` in the module that defines the config's class.

    Raises:
        ValueError: if no family has this config class.
    """
    return _find(config)[1]


def reference_of(config: Any) -> str:
    """Return the family of a config as text for files: `llama3`, or `package.module:NAME` outside this package."""
    return _find(config)[0]


def _find(config: Any) -> tuple[str, Family]:
    kind = type(config)
    external = ((f"{kind.__module__}:{name}", value) for name, value in _values(kind.__module__).items())
    for reference, family in (*((family.name, family) for family in FAMILIES), *external):
        if isinstance(family, Family) and family.config is kind:
            return reference, family
    raise ValueError(
        f"{kind.__module__}.{kind.__qualname__} is not the config class of a model family; expected a config of "
        f"{', '.join(family.name for family in FAMILIES)}, or a module-level value "
        f"Family(name=..., model=..., config={kind.__name__}, ...) in {kind.__module__}"
    )


def named_family(reference: str) -> Family | None:
    """Return the family of a reference from `reference_of`, or None if this process does not know it.

    Searches imported modules only and never imports one: references are read from files, and a file must not decide
    which code runs.
    """
    known = {family.name: family for family in FAMILIES}
    module, _, name = reference.partition(":")
    value = _values(module).get(name) if name else known.get(reference)
    return value if isinstance(value, Family) else None


def _values(module: str) -> dict[str, Any]:
    """Return the attributes of an imported module without getattr, which can trigger lazy imports."""
    return dict(getattr(sys.modules.get(module), "__dict__", {}))


def build_skeleton(name_or_config: Any, *, attention_backend: str = "auto") -> Any:
    """Build a model on the meta device. Materialize it by `model.to_empty(device=...)`, then `init_model_weights`."""
    config = config_of(name_or_config) if isinstance(name_or_config, str) else name_or_config
    with torch.device("meta"):
        return family_of(config).model(config, attention_backend=attention_backend)


def build_model(name_or_config: Any, *, attention_backend: str = "auto") -> Any:
    """Build a model with initialized weights on the default device; `torch.manual_seed` determines the weights.

    name_or_config  a name in MODELS, or a model config
    """
    model = build_skeleton(name_or_config, attention_backend=attention_backend)
    model.to_empty(device=torch.get_default_device())
    init_model_weights(model)
    return model
