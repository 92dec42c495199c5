"""Build a vision-language model from a vision encoder and a text model that were trained separately."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from sightline.models.families import build_model, build_skeleton
from sightline.models.hf.files import check_names, check_weights, read_weights
from sightline.models.hf.format import read_field
from sightline.models.hf.llama3 import LLAMA3_HF
from sightline.models.hf.source import fetch, read_config, read_model_config
from sightline.models.hf.vlm import vision_from_hf, vision_weights
from sightline.models.llama3 import Llama3Config
from sightline.models.vlm import VLM, add_vision

ENCODERS = {
    "Siglip2VisionModel": ("", r"head\..*"),
    "Siglip2Model": ("vision_model.", r"vision_model\.head\..*|text_model\..*|logit_.*"),
}
"""{architecture that contains a vision encoder: (prefix of its tensors, regular expression of tensors to ignore)}."""


def load_vision_pair(
    vision_directory: str | Path, text_directory: str | Path, *, attention_backend: str = "auto", **fields: Any
) -> VLM:
    """Build a VLM in float32 with the weights of two Hugging Face directories, and a newly initialized projector.

    vision_directory  a Siglip2VisionModel, or a Siglip2Model that contains one (google/siglip2-so400m-patch16-naflex)
    text_directory    a LlamaForCausalLM
    fields            fields of the VLMConfig: spatial_merge_size, projector_hidden_size, image_token_id (default: the
                      last id of the vocabulary)

    `save_pretrained` saves it as one directory, from which a run can start.

    Raises:
        ValueError: if a directory contains another model, or as `load_pretrained`.
    """
    vision_directory, text_directory = Path(vision_directory), Path(text_directory)
    text = read_model_config(text_directory)
    if type(text) is not Llama3Config:
        raise ValueError(
            f"{text_directory} contains a model with a {type(text).__name__}; expected a LlamaForCausalLM, because the "
            "decoder of a VLM is a Llama 3"
        )
    hf = read_config(vision_directory)
    architecture = hf["architectures"][0]
    if architecture not in ENCODERS:
        raise ValueError(f"{vision_directory} contains a {architecture}; expected one of {', '.join(ENCODERS)}")
    prefix, ignored = ENCODERS[architecture]
    vision = vision_from_hf({**read_field(hf, "vision_config", dict, hf), "architectures": [architecture]})
    config = add_vision(text, vision=vision, **fields)
    text_directory, vision_directory = fetch(text_directory), fetch(vision_directory)
    text_weights, image_weights = list(LLAMA3_HF.weights(text)), list(vision_weights(vision, prefix))
    check_names(text_directory, text_weights, ignored=LLAMA3_HF.ignored)
    check_names(vision_directory, image_weights, ignored=ignored)
    skeleton = build_skeleton(config)
    check_weights(_decoder(skeleton), text_directory, text_weights, ignored=LLAMA3_HF.ignored)
    check_weights(_encoder(skeleton), vision_directory, image_weights, ignored=ignored)
    model = build_model(config, attention_backend=attention_backend)
    read_weights(_decoder(model), text_directory, text_weights, ignored=LLAMA3_HF.ignored)
    read_weights(_encoder(model), vision_directory, image_weights, ignored=ignored)
    return model


def _decoder(model: VLM) -> nn.Module:
    names = ("embedding", "layers", "norm", "output")
    return nn.ModuleDict({name: module for name, module in model.named_children() if name in names})


def _encoder(model: VLM) -> nn.Module:
    assert model.vision is not None, "only a pipeline stage has no encoder"
    return nn.ModuleDict({"vision": model.vision})
