"""Hugging Face format of the vision-language model: LFM2-VL, whose text model may have any class, here Llama."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from sightline.layers.vision import VisionConfig
from sightline.models.hf import llama3
from sightline.models.hf.format import HuggingFace, Weight, expect, read_field, read_fields, rename, write_fields

FIELDS = {
    "spatial_merge_size": "downsample_factor",
    "projector_hidden_size": "projector_hidden_size",
    "image_token_id": "image_token_id",
}
VISION_FIELDS = {
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "patch_size": "patch_size",
    "num_channels": "num_channels",
    "norm_eps": "layer_norm_eps",
}
VISION_LAYER = {
    "layer_norm1": "attention_norm",
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.out_proj": "attention.output",
    "layer_norm2": "mlp_norm",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
}


def config_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    expect(hf, projector_hidden_act="gelu", projector_bias=True, projector_use_layernorm=True)
    architectures, tied = hf["architectures"], hf.get("tie_word_embeddings", True)
    text, vision = read_field(hf, "text_config", dict, {}), read_field(hf, "vision_config", dict, {})
    text = {**text, "architectures": architectures, "tie_word_embeddings": tied}
    expect(text, model_type="llama")
    return {
        **llama3.config_from_hf(text),
        "vision": vision_from_hf({**vision, "architectures": architectures}),
        **read_fields(hf, FIELDS, spatial_merge_size=2, projector_hidden_size=2560, image_token_id=396),
    }


def vision_from_hf(hf: dict[str, Any]) -> VisionConfig:
    """Convert the fields of a Siglip2VisionModel's config.json."""
    expect(hf, model_type="siglip2_vision_model", hidden_act="gelu_pytorch_tanh")
    missing = {
        "hidden_size": 768,
        "num_layers": 12,
        "num_heads": 12,
        "intermediate_size": 3072,
        "patch_size": 16,
        "num_channels": 3,
        "norm_eps": 1e-6,
    }
    patches = read_field(hf, "num_patches", int, 256)
    grid_size = math.isqrt(patches) if patches > 0 else patches
    return VisionConfig(position_grid_size=grid_size, **read_fields(hf, VISION_FIELDS, **missing))


def config_to_hf(config: Any) -> dict[str, Any]:
    return {
        "architectures": ["Lfm2VlForConditionalGeneration"],
        "model_type": "lfm2_vl",
        "text_config": llama3.config_to_hf(config),
        "vision_config": {
            "architectures": ["Siglip2VisionModel"],
            "model_type": "siglip2_vision_model",
            **write_fields(config.vision, VISION_FIELDS),
            "num_patches": config.vision.position_grid_size**2,
            "vision_use_head": False,
        },
        **write_fields(config, FIELDS),
        "tie_word_embeddings": config.tied_embeddings,
    }


def weights(config: Any) -> Iterator[Weight]:
    for weight in llama3.weights(config):
        yield Weight(weight.theirs.replace("model.", "model.language_model.", 1), weight.ours)
    yield from vision_weights(config.vision, "model.vision_tower.")
    names = {"layer_norm": "norm", "linear_1": "up", "linear_2": "down"}
    yield from rename("model.multi_modal_projector", "projector", names, "weight", "bias")


def vision_weights(config: VisionConfig, prefix: str) -> Iterator[Weight]:
    """Yield the weights of a Siglip2VisionModel whose tensor names start with `prefix`."""
    yield Weight(f"{prefix}embeddings.position_embedding.weight", "vision.positions")
    outer = {"embeddings.patch_embedding": "embedding", "post_layernorm": "norm"}
    layers = {
        f"encoder.layers.{i}.{theirs}": f"layers.{i}.{ours}"
        for i in range(config.num_layers)
        for theirs, ours in VISION_LAYER.items()
    }
    for theirs, ours in {**outer, **layers}.items():
        for kind in ("weight", "bias"):
            yield Weight(f"{prefix}{theirs}.{kind}", f"vision.{ours}.{kind}")


VLM_HF = HuggingFace(
    architectures=("Lfm2VlForConditionalGeneration",),
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    weights=weights,
    ignored=r"lm_head\.weight|.*\.rotary_emb\.inv_freq|model\.vision_tower\.head\..*",
)
