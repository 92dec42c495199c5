"""Find Hugging Face directories, here or on the Hub, and read what they have besides weights."""

from __future__ import annotations

import reprlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sightline.models.families import FAMILIES
from sightline.models.family import Family
from sightline.models.hf.files import INDEX, holds_weights
from sightline.models.hf.format import read_field
from sightline.models.hf.hub import download, is_hub_name
from sightline.paths import file_inside, read_json

CONFIG = "config.json"
COPIED_FIELDS = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of config.json that the models do not use, copied because readers of the directory need them."""
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Files that are copied from the source directory to the saved one."""


WEIGHT_FILES = (INDEX, "*.safetensors")


def find_pretrained(directory: str | Path, families: Iterable[Family] = FAMILIES) -> Path:
    """Return a Hugging Face directory: the one that is given, or the local copy of the Hub model of that name.

    Raises:
        ValueError: if the model cannot be downloaded, none of `families` supports it, or a file is not a plain one.
    """
    directory = Path(directory).expanduser()
    if is_hub_name(directory):
        read_model_config(directory, families)  # refuses a model that is not supported before its weights are read
    directory = fetch(directory)
    for name in (CONFIG, *COPIED_FILES):
        file_inside(directory, name)
    return directory


def fetch(directory: Path, *, weights: bool = True) -> Path:
    """Return the directory, or if it is the name of a model on the Hub, the downloaded copy, maybe without weights.

    Raises:
        ValueError: if the model cannot be downloaded.
    """
    if not is_hub_name(directory):
        return directory
    return download(str(directory), (CONFIG, *COPIED_FILES, *(WEIGHT_FILES if weights else ())))


def is_pretrained(directory: Path) -> bool:
    """Return whether this is a Hugging Face directory: it has weights, or a config.json that names an architecture."""
    try:
        return holds_weights(directory) or bool(read_config(directory))
    except ValueError:
        return False


def read_config(directory: Path) -> dict[str, Any]:
    """Return the fields of the config.json of a directory, or of a model on the Hugging Face Hub.

    Raises:
        ValueError: if there is no config.json, or it is not the config of a Hugging Face model.
    """
    if is_hub_name(directory):
        directory = download(str(directory), (CONFIG,))
    path = directory / CONFIG
    try:
        hf = read_json(directory, CONFIG)
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist; expected a Hugging Face directory: {CONFIG} and safetensors files"
        ) from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    names = hf.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ValueError(
            f"{path} is not the config of a Hugging Face model: architectures is {reprlib.repr(names)}; expected a "
            'list such as ["LlamaForCausalLM"]'
        )
    return hf


def find_family(hf: Mapping[str, Any], directory: Path, families: Iterable[Family]) -> Family:
    """Return the one of `families` that supports the architecture of a config.json.

    Raises:
        ValueError: if none does, or the weights are quantized.
    """
    known: list[str] = []
    for family in families:
        architectures = family.hf.architectures if family.hf else ()
        if hf["architectures"][0] in architectures:
            quantization = read_field(hf, "quantization_config", dict)
            if quantization:
                method = quantization.get("quant_method")
                raise ValueError(
                    f"the weights in {directory} are quantized ({method}); expected float32, bfloat16 or float16: "
                    "use an unquantized model, or dequantize this one with transformers and save it"
                )
            return family
        known.extend(architectures)
    raise ValueError(
        f"{directory} contains a {hf['architectures'][0]}, which is not supported; the supported architectures are: "
        f"{', '.join(dict.fromkeys(known)) or 'none'}; for a family of your own, use --family package.module:NAME"
    )


def read_model_config(directory: Path, families: Iterable[Family] = FAMILIES) -> Any:
    """Return the model config for a Hugging Face directory.

    Raises:
        ValueError: if no family supports the model, or config.json lacks a field or asks for an unsupported feature.
    """
    hf = read_config(directory)
    family = find_family(hf, directory, families)
    try:
        return family.config_from_hf(hf)
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from error
    except KeyError as error:
        raise ValueError(f"{directory / CONFIG} has no field {error}, which {hf['architectures'][0]} needs") from error


def read_copied_fields(source: Path, name: str = CONFIG) -> dict[str, Any]:
    """Return the fields of a directory's config.json, or a file of another name, that are copied; none without it.

    Raises:
        ValueError: if the file is not a JSON object inside the directory.
    """
    if not (source / name).exists():
        return {}
    theirs = read_json(source, name)
    return {name: theirs[name] for name in COPIED_FIELDS if name in theirs}


def copy_files(source: Path, target: Path) -> None:
    """Copy the files of a directory that are neither config nor weights, such as the tokenizer, if they exist.

    Raises:
        ValueError: if one of them is a link that leaves the directory.
        OSError: if copying fails.
    """
    for path in [file_inside(source, name) for name in COPIED_FILES]:
        if path.exists():
            shutil.copyfile(path, target / path.name)
