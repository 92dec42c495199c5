"""Load a trained model from a run, a checkpoint or a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from sightline import config
from sightline.data import Tokenizer, load_tokenizer
from sightline.models import FAMILIES, Family, build_model, build_skeleton, load_pretrained
from sightline.models.hf.source import find_pretrained, is_pretrained
from sightline.numbers import size
from sightline.training.checkpoint import CONFIG, TOKENIZER, check_checkpoint, read_tensors
from sightline.training.checkpoint_directory import is_run
from sightline.training.device import choose_device
from sightline.training.run_directory import find_checkpoint, load_config
from sightline.training.step import Model


class LoadedModel(NamedTuple):
    """A model in evaluation mode and its tokenizer."""

    model: Model
    tokenizer: Tokenizer


def load(
    directory: str | Path,
    *,
    device: str | torch.device | None = None,
    family: Family | None = None,
    verify: bool = True,
) -> LoadedModel:
    """Load the model and tokenizer of a run (its newest checkpoint), a checkpoint or a Hugging Face directory.

    directory  or the name of a model on the Hugging Face Hub, such as Qwen/Qwen3-0.6B, which is downloaded
    device     device of the weights; default: CUDA if available, else CPU. On a CPU weights are loaded as float32,
               because most CPUs compute half precision several times slower
    family     model family, for a directory whose family is defined outside the package
    verify     verify the checksums of a checkpoint, which reads its files once more

    Raises:
        ValueError: if the directory is none of these, is damaged, or has no tokenizer.
    """
    directory = Path(directory).expanduser()
    device = choose_device(config.TrainingConfig()) if device is None else torch.device(device)
    if not is_run(directory):
        directory = find_pretrained(directory, FAMILIES if family is None else (family,))
        if is_pretrained(directory):
            tokenizer = load_tokenizer(directory)
            dtype = torch.float32 if device.type == "cpu" else None
            with device:
                return LoadedModel(load_pretrained(directory, dtype=dtype, family=family).eval(), tokenizer)
    checkpoint = find_checkpoint(directory)
    check_checkpoint(checkpoint, contents=verify)
    run = load_config(checkpoint / CONFIG, family)
    check_size(build_skeleton(run.model), checkpoint)
    with device:
        model = build_model(run.model)
    read_tensors(checkpoint, {"model": model.state_dict()})
    return LoadedModel(model.eval(), load_tokenizer(checkpoint / TOKENIZER))


def check_size(model: Model, checkpoint: Path) -> None:
    """Check that a checkpoint is not smaller than the model of its config, before memory is allocated for the model.

    model  may be on the meta device

    Raises:
        ValueError: if its files have fewer bytes than the weights.
    """
    expected = sum(tensor.nbytes for tensor in model.state_dict().values())
    actual = sum(file.stat().st_size for file in checkpoint.iterdir())
    if actual < expected:
        raise ValueError(
            f"{checkpoint} has {size(actual)}, but the model in its {CONFIG} has {size(expected)} of weights; expected "
            f"the {CONFIG} that the run wrote: restore it, or use another checkpoint"
        )
