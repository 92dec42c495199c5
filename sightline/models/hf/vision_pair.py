"""A model that sees, from an encoder and a decoder that were trained apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from sightline.models.families import build_model
from sightline.models.hf.directory import read_config, read_model_config
from sightline.models.hf.files import read_weights
from sightline.models.hf.llama3 import LLAMA3_HF
from sightline.models.hf.vlm import vision_from_hf, vision_weights
from sightline.models.llama3 import Llama3Config
from sightline.models.vlm import VLM, add_vision

TOWERS = {
    "Siglip2VisionModel": ("", r"head\..*"),
    "Siglip2Model": ("vision_model.", r"vision_model\.head\..*|text_model\..*|logit_.*"),
}
"""Architectures that hold an encoder: how the names of its tensors begin, and which others the files may hold."""


def load_vision_pair(
    vision_directory: str | Path, text_directory: str | Path, *, attention_backend: str = "auto", **fields: Any
) -> VLM:
    """A VLM with the weights of two Hugging Face directories, in float32; the projector between them is fresh.

    vision_directory  a Siglip2VisionModel, or the Siglip2Model it is part of (google/siglip2-so400m-patch16-naflex)
    text_directory    a LlamaForCausalLM
    fields            of the VLMConfig: merge, projector, image_token (without it, the vocabulary's last token)

    `save_pretrained` writes it as one directory, which a run can start from.
    Errors: ValueError for directories of other models, and as load_pretrained.
    """
    vision_directory, text_directory = Path(vision_directory), Path(text_directory)
    text = read_model_config(text_directory)
    if type(text) is not Llama3Config:
        raise ValueError(
            f"{text_directory} holds a model with a {type(text).__name__}, expected a LlamaForCausalLM: the decoder of "
            "a VLM is a Llama 3"
        )
    hf = read_config(vision_directory)
    architecture = hf["architectures"][0]
    if architecture not in TOWERS:
        raise ValueError(f"{vision_directory} holds a {architecture}; expected one of {', '.join(TOWERS)}")
    prefix, ignored = TOWERS[architecture]
    vision = vision_from_hf({**hf.get("vision_config", hf), "architectures": [architecture]})
    model = build_model(add_vision(text, vision=vision, **fields), attention_backend=attention_backend)
    parts = ("embedding", "layers", "norm", "output")
    decoder = nn.ModuleDict({name: part for name, part in model.named_children() if name in parts})
    read_weights(decoder, text_directory, LLAMA3_HF.weights(text), ignored=LLAMA3_HF.ignored)
    encoder = nn.ModuleDict({"vision": model.vision})
    read_weights(encoder, vision_directory, vision_weights(vision, prefix), ignored=ignored)
    return model
