"""A trained model, from the directory of its run."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from sightline.config import Run
from sightline.data import Tokenizer, load_tokenizer
from sightline.models import Family, build_model
from sightline.training.checkpoint import CONFIG, TOKENIZER, check_checkpoint, read_tensors
from sightline.training.run_directory import find_checkpoint, load_config
from sightline.training.step import Model


class Trained(NamedTuple):
    """What a checkpoint holds for those who do not train on."""

    run: Run
    model: Model
    tokenizer: Tokenizer
    checkpoint: Path


def load_trained(path: Path, device: torch.device, family: Family | None = None) -> Trained:
    """The model of a checkpoint, or of the newest one where `path` is the directory of a run.

    family  of the model, as in `load_config`

    Errors: ValueError where there is none, or it is not whole.
    """
    checkpoint = find_checkpoint(path)
    check_checkpoint(checkpoint)
    run = load_config(checkpoint / CONFIG, family)
    with device:
        model = build_model(run.model)
    read_tensors(checkpoint, {"model": model.state_dict()})
    return Trained(run, model.eval(), load_tokenizer(checkpoint / TOKENIZER), checkpoint)
