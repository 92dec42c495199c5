"""Models: one file each, read top to bottom. `MODELS` names their sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sightline.models.deepseek_v3 import DEEPSEEK_V3_SIZES, DeepseekV3, DeepseekV3Config
from sightline.models.drawing import draw_weights
from sightline.models.gpt_oss import GPT_OSS_SIZES, GptOss, GptOssConfig
from sightline.models.llama3 import LLAMA3_SIZES, Llama3, Llama3Config, Llama3RopeScaling
from sightline.models.llama4 import LLAMA4_SIZES, Llama4, Llama4Config
from sightline.models.pretrained import load_pretrained, save_pretrained
from sightline.models.qwen3 import QWEN3_SIZES, Qwen3, Qwen3Config
from sightline.models.qwen3_next import QWEN3_NEXT_SIZES, Qwen3Next, Qwen3NextConfig
from sightline.models.vlm import VLM, VLM_SIZES, VisionConfig, VLMConfig

__all__ = [
    "MODELS",
    "VLM",
    "DeepseekV3",
    "DeepseekV3Config",
    "GptOss",
    "GptOssConfig",
    "Llama3",
    "Llama3Config",
    "Llama3RopeScaling",
    "Llama4",
    "Llama4Config",
    "Qwen3",
    "Qwen3Config",
    "Qwen3Next",
    "Qwen3NextConfig",
    "VLMConfig",
    "VisionConfig",
    "build_model",
    "build_skeleton",
    "config_of",
    "draw_weights",
    "load_pretrained",
    "save_pretrained",
]

SIZES: dict[str, Mapping[str, Any]] = {
    "llama3": LLAMA3_SIZES,
    "llama4": LLAMA4_SIZES,
    "qwen3": QWEN3_SIZES,
    "qwen3_next": QWEN3_NEXT_SIZES,
    "deepseek_v3": DEEPSEEK_V3_SIZES,
    "gpt_oss": GPT_OSS_SIZES,
    "vlm": VLM_SIZES,
}
"""The configs of each family's sizes."""

MODELS: dict[str, Any] = {
    f"{family}-{size}": config for family, sizes in SIZES.items() for size, config in sizes.items()
}

MODEL_CLASSES: dict[type, Any] = {
    Llama3Config: Llama3,
    DeepseekV3Config: DeepseekV3,
    GptOssConfig: GptOss,
    Llama4Config: Llama4,
    Qwen3Config: Qwen3,
    Qwen3NextConfig: Qwen3Next,
    VLMConfig: VLM,
}


def config_of(name: str) -> Any:
    """The config of a named size: `llama3-tiny`, `llama3-8b`, ..."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; the models are: {', '.join(MODELS)}")
    return MODELS[name]


def build_skeleton(name_or_config: Any, *, attention_backend: str = "auto") -> Any:
    """A model on the meta device, without memory for its weights: `model.to_empty(device=...)`, then `draw_weights`.

    name_or_config  a name in MODELS, or the config of a family
    """
    config = config_of(name_or_config) if isinstance(name_or_config, str) else name_or_config
    with torch.device("meta"):
        return MODEL_CLASSES[type(config)](config, attention_backend=attention_backend)


def build_model(name_or_config: Any, *, attention_backend: str = "auto") -> Any:
    """A model with fresh weights on the default device; `torch.manual_seed` before it decides them.

    name_or_config  a name in MODELS, or the config of a family
    """
    model = build_skeleton(name_or_config, attention_backend=attention_backend)
    model.check_backend(torch.get_default_device(), torch.get_default_dtype(), training=False)
    model.to_empty(device=torch.get_default_device())
    draw_weights(model)
    return model
