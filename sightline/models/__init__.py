"""Model families: one file each, ending in its `Family`. `FAMILIES` lists them; `MODELS` are the named configs."""

from sightline.models.block import Block
from sightline.models.decoder import Decoder, DecoderConfig
from sightline.models.deepseek_v3 import DeepseekV3, DeepseekV3Config
from sightline.models.families import FAMILIES, MODELS, build_model, build_skeleton, config_of, family_of
from sightline.models.family import Family
from sightline.models.gpt_oss import GptOss, GptOssConfig
from sightline.models.hf.directory import load_pretrained, save_pretrained
from sightline.models.llama3 import Llama3, Llama3Config, Llama3RopeScaling
from sightline.models.llama4 import Llama4, Llama4Config
from sightline.models.qwen3 import Qwen3, Qwen3Config
from sightline.models.qwen3_next import Qwen3Next, Qwen3NextConfig
from sightline.models.vlm import VLM, VisionConfig, VLMConfig
from sightline.models.weight_init import init_model_weights

__all__ = [
    "FAMILIES",
    "MODELS",
    "VLM",
    "Block",
    "Decoder",
    "DecoderConfig",
    "DeepseekV3",
    "DeepseekV3Config",
    "Family",
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
    "family_of",
    "init_model_weights",
    "load_pretrained",
    "save_pretrained",
]
