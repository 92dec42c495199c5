"""Models in Hugging Face directories: config.json and safetensors, in and out."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sightline.models.families import FAMILIES, family_of
from sightline.models.family import Family
from sightline.models.hf.files import holds_weights, read_weights, write_weights
from sightline.models.hf.format import HuggingFace
from sightline.torch_private import is_dtensor

CONFIG = "config.json"
MAX_SHARD_BYTES = 5_000_000_000
"""Size of a file of weights."""
KEPT_FIELDS = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
"""Fields of config.json of no meaning to our models, which those who read the directory want."""
KEPT_FILES = (
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
"""Files that travel along from one directory to the next."""


def load_pretrained(
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    attention_backend: str = "auto",
    family: Family | None = None,
) -> Any:
    """The model of a Hugging Face directory, on the default device.

    dtype   of its parameters; without it, the one that config.json names, else float32
    family  that the model is of; without it, the one of FAMILIES that knows its architecture

    Memory stays near one file of weights above the model.
    Errors: ValueError for what is no such directory, a model that no family here can be, and weights that do not fit.
    """
    directory = Path(directory)
    hf = read_config(directory)
    config = read_model_config(directory, FAMILIES if family is None else (family,))
    device = torch.get_default_device()
    with torch.device("meta"):
        model = family_of(config).model(config, attention_backend=attention_backend)
    for parameter in model.parameters():  # and no buffers: those are few, and some lose their meaning when rounded
        parameter.data = parameter.data.to(dtype or _dtype_of(hf))
    model.check_backend(device, dtype or _dtype_of(hf), training=False)
    model.to_empty(device=device)
    read_pretrained(model, directory)
    return model


def read_pretrained(model: Any, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Fill a model that is there already with the weights of a Hugging Face directory.

    state  the tensors to fill, by their names in the model: see `read_weights`

    Errors: as `load_pretrained`.
    """
    known = find_family(read_config(directory), directory, (family_of(model.config),)).hf
    assert known is not None, "a family that knows an architecture has a format"
    read_weights(model, directory, known.weights(model.config), ignored=known.ignored, state=state)


def save_pretrained(
    model: Any,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    source: str | Path | None = None,
    config_fields: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model as a Hugging Face directory that transformers loads.

    dtype            what its parameters are written in; without it, their own
    source           a directory whose tokenizer and generation config travel along
    config_fields    more of config.json, where the source does not say: what readers of the directory want to know
                     and the model does not, such as eos_token_id
    max_shard_bytes  size of a file of weights; a larger tensor has a file to itself

    Everything is written aside first: a full disk or a kill leaves no half model. Errors: ValueError where the
    directory has weights already, or the model is of no family or shared among processes; OSError where the disk does
    not take it.
    """
    state = model.state_dict()
    shared = next((name for name, tensor in state.items() if is_dtensor(tensor)), None)
    if shared:
        raise ValueError(
            f"{shared} is a DTensor: this process holds a part of the model; expected all of it. Save a checkpoint: "
            "sightline convert and --checkpoint.export write it from there, without gathering it anywhere"
        )
    writer = PretrainedWriter(model, Path(directory), dtype=dtype, max_shard_bytes=max_shard_bytes)
    try:
        writer.begin(None if source is None else Path(source), config_fields or {})
        writer.write(lambda names: state)
        writer.finish()
    except OSError:
        writer.abandon()
        raise


class PretrainedWriter:
    """A Hugging Face directory while it is written: aside, by one process or by several that share its files.

    The first process begins, then all write, then the first one finishes; or it abandons what was written.
    """

    def __init__(self, model: Any, directory: Path, *, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
        self.format = _format_of(model)
        if max_shard_bytes < 1:
            raise ValueError(f"max-shard-bytes must be at least 1, got {max_shard_bytes}")
        if holds_weights(directory):
            raise ValueError(f"{directory} holds the weights of a model already; choose another directory, or empty it")
        self.model, self.directory, self.partial = model, directory, directory / ".partial"
        self.dtype, self.max_shard_bytes = dtype, max_shard_bytes

    def begin(self, source: Path | None, config_fields: Mapping[str, Any]) -> None:
        """All but the weights. Errors: OSError."""
        written = self.dtype or next(self.model.parameters()).dtype
        hf = {**self.format.config_to_hf(self.model.config), "dtype": str(written).removeprefix("torch.")}
        hf |= config_fields
        if source is not None and (source / CONFIG).is_file():
            theirs = json.loads((source / CONFIG).read_text())
            hf |= {name: theirs[name] for name in KEPT_FIELDS if name in theirs}
        with self._telling():
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)
            for name in KEPT_FILES:
                if source is not None and (source / name).is_file():
                    shutil.copyfile(source / name, self.partial / name)
            (self.partial / CONFIG).write_text(json.dumps(hf, indent=2) + "\n")

    def write(self, read: Callable[[list[str]], Mapping[str, Tensor]], rank: int = 0, world: int = 1) -> None:
        """This process's share of the files of weights; `read` gives tensors of the model by name. Errors: OSError."""
        with self._telling():
            write_weights(
                self.model,
                self.partial,
                self.format.weights(self.model.config),
                dtype=self.dtype,
                max_shard_bytes=self.max_shard_bytes,
                read=read,
                rank=rank,
                world=world,
            )

    def finish(self) -> None:
        """Everything to its place. Errors: OSError."""
        with self._telling():
            for file in sorted(self.partial.iterdir(), key=lambda file: file.name == CONFIG):  # no model without it
                file.rename(self.directory / file.name)
            self.partial.rmdir()

    def abandon(self) -> None:
        shutil.rmtree(self.partial, ignore_errors=True)

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            number = error.errno if isinstance(error, OSError) else None
            raise OSError(
                number or errno.EIO,
                f"the model could not be written to {self.directory}: {error}; nothing of it was left there",
            ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """The fields of a directory's config.json.

    Errors: ValueError where there is none or it is no Hugging Face model's.
    """
    path = directory / CONFIG
    try:
        hf = json.loads(path.read_text())
        hf["architectures"][0]
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist; expected a Hugging Face directory: {CONFIG} and safetensors files"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{path} is not the config of a Hugging Face model ({type(error).__name__}: {error}); expected a JSON "
            'object with "architectures"'
        ) from error
    return hf


def find_family(hf: Mapping[str, Any], directory: Path, families: Iterable[Family]) -> Family:
    """The family, among some, that reads such a config.

    Errors: ValueError naming the architectures that they know.
    """
    known: list[str] = []
    for family in families:
        architectures = family.hf.architectures if family.hf else ()
        if hf["architectures"][0] in architectures:
            if hf.get("quantization_config"):
                method = hf["quantization_config"].get("quant_method")
                raise ValueError(
                    f"the weights in {directory} are quantized ({method}); expected float32, bfloat16 or float16: "
                    "get them unquantized, or dequantize and save them with transformers"
                )
            return family
        known.extend(architectures)
    raise ValueError(
        f"{directory} holds a {hf['architectures'][0]}, which is not known here; the architectures are: "
        f"{', '.join(dict.fromkeys(known)) or 'none'}; name a family of your own by --family package.module:NAME"
    )


def read_model_config(directory: Path, families: Iterable[Family] = FAMILIES) -> Any:
    """The config of the model in a Hugging Face directory.

    Errors: ValueError where a field is missing or asks for what our models do not do, or none of the families knows it.
    """
    hf = read_config(directory)
    try:
        return find_family(hf, directory, families).config_from_hf(hf)
    except KeyError as error:
        raise ValueError(f"{directory / CONFIG} has no field {error}, which {hf['architectures'][0]} needs") from error


def _format_of(model: Any) -> HuggingFace:
    if not hasattr(model, "config"):
        known = ", ".join(family.model.__name__ for family in FAMILIES)
        raise ValueError(f"cannot save a {type(model).__name__} in Hugging Face's form; expected one of {known}")
    family = family_of(model.config)
    if family.hf is None:
        raise ValueError(
            f"the family {family.name} has no Hugging Face format, so a {type(model).__name__} cannot be saved in it; "
            "give its Family value a hf=HuggingFace(...)"
        )
    return family.hf


def _dtype_of(hf: dict[str, Any]) -> torch.dtype:
    name = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    dtype = getattr(torch, name, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"config.json has dtype {name!r}; expected float32, bfloat16 or float16")
    return dtype
