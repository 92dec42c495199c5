"""Load a trained model from a run, a checkpoint or a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from sightline import config
from sightline.data import Tokenizer, load_tokenizer
from sightline.models import Family, build_model, load_pretrained
from sightline.models.hf.files import holds_weights
from sightline.training.checkpoint import CONFIG, TOKENIZER, check_checkpoint, read_tensors
from sightline.training.run_directory import find_checkpoint, load_config
from sightline.training.setup import choose_device
from sightline.training.step import Model


class LoadedModel(NamedTuple):
    """A model in evaluation mode and its tokenizer."""

    model: Model
    tokenizer: Tokenizer


def load(
    directory: str | Path, *, device: str | torch.device | None = None, family: Family | None = None
) -> LoadedModel:
    """Load the model and tokenizer of a run (its newest checkpoint), a checkpoint or a Hugging Face directory.

    device  device of the weights; default: CUDA if available, else CPU. On a CPU weights are loaded as float32, because
            most CPUs compute half precision several times slower
    family  model family, for a directory whose family is defined outside the package

    Raises:
        ValueError: if the directory is none of these, is incomplete, or has no tokenizer.
    """
    directory = Path(directory).expanduser()
    device = choose_device(config.TrainingConfig()) if device is None else torch.device(device)
    if holds_weights(directory):
        tokenizer = load_tokenizer(directory)
        dtype = torch.float32 if device.type == "cpu" else None
        with device:
            return LoadedModel(load_pretrained(directory, dtype=dtype, family=family).eval(), tokenizer)
    checkpoint = find_checkpoint(directory)
    check_checkpoint(checkpoint)
    run = load_config(checkpoint / CONFIG, family)
    with device:
        model = build_model(run.model)
    read_tensors(checkpoint, {"model": model.state_dict()})
    return LoadedModel(model.eval(), load_tokenizer(checkpoint / TOKENIZER))
