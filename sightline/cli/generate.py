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
from sightline.generation import SamplingConfig, generate_batch, stream
from sightline.models import VLMConfig
from sightline.training.device import choose_device

IMAGE_PLACEHOLDER = "<image>"
"""Marks the position of an image in a prompt."""


@dataclass(frozen=True, kw_only=True)
class Generate(SamplingConfig):
    """Continue a prompt, or a batch of prompts, with a trained model.

    examples:
      sightline generate runs/llama3-tiny --prompt "def " --temperature 0.5
      sightline generate ~/Qwen3-0.6B --prompt "The capital of France is"
      sightline generate ~/Qwen3-0.6B --prompt "The capital of France is" --prompt "2 + 2 ="
      sightline generate ~/Qwen3-0.6B --prompt-file prompts.txt
      sightline generate runs/vlm-tiny --image circle.png --prompt "<image>a"
      sightline generate package.module:RUN --prompt "def "
    """

    source: SourceArgument
    """A run directory, for its newest checkpoint; a checkpoint; a Hugging Face directory, or the name of a Hub model.
    Or package.module:NAME, a Run of your own, for its output directory."""
    family: str | None = None
    """The family of the directory's model, if it is your own: package.module:NAME, a Family or a Run."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The text to continue, "def " by default; `<image>` marks the position of an image. Repeat the option to continue
    several texts together, each with a seed of its own: seed, seed + 1, ..."""
    prompt_file: Path | None = None
    """Text file with one prompt per line, after those of --prompt; empty lines are skipped."""
    image: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Image file, for vision-language models; repeat the option for more images, in the order of the prompts."""
    max_new_tokens: int = 200
    """Most tokens to generate; generation stops earlier if the model ends the document."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses CUDA if it is available."""
    verify: bool = True
    """Verify the checksums of a checkpoint, which reads its files once more."""


def main(argv: list[str]) -> None:
    options = parse_options(Generate, argv, prog="sightline generate")
    texts = read_texts(options.prompt, options.prompt_file)
    device = choose_device(config.TrainingConfig(device=options.device))
    directory, family = find_source(options.source, options.family)
    model, tokenizer = sightline.load(directory, device=device, family=family, verify=options.verify)
    prompts, extras = read_prompts(texts, options.image, model.config, tokenizer)
    if len(texts) == 1:
        pieces = stream(model, tokenizer, prompts[0], options, extra=extras[0])
        print(texts[0], end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return
    for text, generated in zip(texts, generate_batch(model, tokenizer, prompts, options, extras=extras), strict=True):
        print(f"{text}{generated}\n")


def read_texts(prompts: Sequence[str], path: Path | None) -> list[str]:
    """Return the texts to continue: those of the command line, then the lines of a file; "def " if there are none.

    Raises:
        ValueError: if a text has characters that cannot be encoded, or the file cannot be read or has no prompt.
    """
    texts = list(prompts)
    if path is not None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompt-file {path}: {error}; expected a UTF-8 text file, one prompt a line") from error
        if not any(line.strip() for line in lines):
            raise ValueError(f"--prompt-file {path} has no prompt; expected one a line")
        texts += [line for line in lines if line.strip()]
    for text in texts:
        check_text("--prompt", text)
    return texts or ["def "]


def read_prompts(
    texts: Sequence[str], images: Sequence[Path], model: object, tokenizer: Tokenizer
) -> tuple[list[str | list[int]], list[dict[str, Tensor]]]:
    """Return `read_prompt` of each text; each takes as many of the images as it has placeholders, in order.

    Raises:
        ValueError: if `read_prompt` does, or images are left over.
    """
    prompts, extras, remaining = [], [], list(images)
    for index, text in enumerate(texts):
        last = index == len(texts) - 1  # gets the images that are left, so that their number is checked
        count = len(remaining) if last else text.count(IMAGE_PLACEHOLDER)
        prompt, extra = read_prompt(text, remaining[:count], model, tokenizer)
        prompts.append(prompt)
        extras.append(extra)
        remaining = remaining[count:]
    return prompts, extras


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
