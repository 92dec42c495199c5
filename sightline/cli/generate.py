"""`sightline generate DIRECTORY`: generate text with a trained model."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from torch import Tensor

import sightline
from sightline import config
from sightline.cli.options import parse_options
from sightline.cli.source import SourceArgument, find_source
from sightline.config.checks import check_text
from sightline.data import Tokenizer, pack_patches
from sightline.data.image_files import read_image
from sightline.generation import SamplingConfig, stream
from sightline.models import VLMConfig
from sightline.training.device import choose_device

IMAGE_PLACEHOLDER = "<image>"
"""Marks the position of an image in a prompt."""


@dataclass(frozen=True, kw_only=True)
class Generate(SamplingConfig):
    """Continue a prompt with a trained model, token by token.

    examples:
      sightline generate runs/llama3-tiny --prompt "def " --temperature 0.5
      sightline generate ~/Qwen3-0.6B --prompt "The capital of France is"
      sightline generate runs/vlm-tiny --image circle.png --prompt "<image>a"
      sightline generate package.module:RUN --prompt "def "
    """

    source: SourceArgument
    """A run directory, for its newest checkpoint; a checkpoint; a Hugging Face directory, or the name of a Hub model.
    Or package.module:NAME, a Run of your own, for its output directory."""
    family: str | None = None
    """The family of the directory's model, if it is your own: package.module:NAME, a Family or a Run."""
    prompt: str = "def "
    """The text to continue; `<image>` marks the position of an image."""
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Image file, for vision-language models; repeat the option for more images, in the order of the prompt."""
    max_new_tokens: int = 200
    """Most tokens to generate; generation stops earlier if the model ends the document."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses CUDA if it is available."""
    verify: bool = True
    """Verify the checksums of a checkpoint, which reads its files once more."""


def main(argv: list[str]) -> None:
    options = parse_options(Generate, argv, prog="sightline generate")
    check_text("--prompt", options.prompt)
    device = choose_device(config.TrainingConfig(device=options.device))
    directory, family = find_source(options.source, options.family)
    model, tokenizer = sightline.load(directory, device=device, family=family, verify=options.verify)
    prompt, extra = read_prompt(options.prompt, options.image, model.config, tokenizer)
    pieces = stream(model, tokenizer, prompt, options, extra=extra)
    print(options.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def read_prompt(
    prompt: str, images: Sequence[Path], model: object, tokenizer: Tokenizer
) -> tuple[str | list[int], dict[str, Tensor]]:
    """Return the prompt and extra inputs of `stream`: the text unchanged, or token ids and the patches of the images.

    model  the model's config

    Raises:
        ValueError: if the model takes no images, or the prompt does not have one `<image>` per image.
    """
    if not isinstance(model, VLMConfig):
        if images:
            family = type(model).__name__.removesuffix("Config")
            raise ValueError(
                f"--image {images[0]}: a {family} model takes text only; use a model of the family vlm, or leave it out"
            )
        return prompt, {}
    texts = prompt.split(IMAGE_PLACEHOLDER)
    if len(texts) - 1 != len(images):
        raise ValueError(
            f"the prompt {prompt!r} contains {IMAGE_PLACEHOLDER} {len(texts) - 1} times, but --image was given "
            f"{len(images)} times; write {IMAGE_PLACEHOLDER} at the position of each image: "
            f"--prompt {shlex.quote(IMAGE_PLACEHOLDER * max(1, len(images)) + 'a')}"
        )
    if not images:
        return prompt, {}
    size, merge = model.vision.patch_size, model.spatial_merge_size
    read = [
        read_image(path, patch_size=size, merge=merge, most_patches=model.vision.position_grid_size**2)
        for path in images
    ]
    ids = tokenizer.encode_prompt(texts[0])
    for image, text in zip(read, texts[1:], strict=True):
        height, width = image.shape[0] // (size * merge), image.shape[1] // (size * merge)
        ids += [model.image_token_id] * (height * width)
        ids += tokenizer.encode_prompt(text)[0 if tokenizer.bos_id is None else 1 :]
    return ids, pack_patches([read], size)
