"""A model that sees, from an encoder and a decoder that were trained apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from sightline.layers.vision import VisionEncoder
from sightline.models import VLM, Llama3, Llama3Config, build_model
from sightline.models.pretrained import read_config, read_model_config, read_pretrained
from sightline.models.vlm import VisionConfig, add_vision, vision_from_hf, vision_to_hf, vision_weights
from sightline.models.weights import HuggingFace, read_weights


def load_vision_pair(
    vision_directory: str | Path,
    text_directory: str | Path,
    *,
    attention_backend: str = "auto",
    **fields: Any,
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
    vision = read_vision_config(vision_directory)
    model = build_model(add_vision(text, vision=vision, **fields), attention_backend=attention_backend)
    with torch.device("meta"):
        decoder = Llama3(text)
    for part in ("embedding", "layers", "norm", "output"):
        setattr(decoder, part, getattr(model, part))
    read_pretrained(decoder, text_directory)
    read_weights(_Tower(model.vision, vision), vision_directory, TOWERS[_architecture(vision_directory)])
    return model


def read_vision_config(directory: Path) -> VisionConfig:
    """The encoder's part of a directory's config.json."""
    hf = read_config(directory)
    if _architecture(directory) == "Siglip2Model":
        hf = {**hf["vision_config"], "architectures": hf["architectures"]}
    return vision_from_hf(hf)


def _architecture(directory: Path) -> str:
    name = read_config(directory)["architectures"][0]
    if name not in TOWERS:
        raise ValueError(f"{directory} holds a {name}; expected one of {', '.join(TOWERS)}")
    return name


class _Tower(nn.Module):
    """The encoder with its config, as `read_weights` wants a model."""

    def __init__(self, vision: VisionEncoder, config: VisionConfig) -> None:
        super().__init__()
        self.vision, self.config = vision, config


def _tower(architecture: str, prefix: str, ignored: str) -> HuggingFace:
    def weights(config: VisionConfig) -> Any:
        return vision_weights(config, prefix)

    return HuggingFace(
        model=_Tower,
        architectures=(architecture,),
        config_from_hf=vision_from_hf,
        config_to_hf=vision_to_hf,
        weights=weights,
        ignored=ignored,
    )


TOWERS = {
    "Siglip2VisionModel": _tower("Siglip2VisionModel", "", r"head\..*"),
    "Siglip2Model": _tower("Siglip2Model", "vision_model.", r"vision_model\.head\..*|text_model\..*|logit_.*"),
}
