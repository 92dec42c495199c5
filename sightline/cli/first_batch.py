"""The first training batch of a recipe or run and its masks, for the commands that plot or count masks."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from sightline.batch import Batch
from sightline.config import Run
from sightline.data import load_documents, open_loader, split_documents, train_tokenizer
from sightline.masks import AttentionMask
from sightline.models import build_model
from sightline.models.hf.source import fetch
from sightline.training.checkpoint import TOKENIZER
from sightline.training.setup import open_tokenizer
from sightline.training.step import Model, prepare_batch
from sightline.training.terminal import shown


@dataclass(frozen=True, kw_only=True)
class MaskSource:
    """Named masks to plot; for a recipe or run also the model and batch that they belong to."""

    title: str
    masks: dict[str, AttentionMask]
    model: Model | None = None
    batch: Batch | None = None


def first_batch(title: str, run: Run, directory: Path | None, sequence_length: int | None) -> MaskSource:
    """Build the first training batch of `run` and its masks.

    directory        the run directory, whose tokenizer is used; None trains or loads the tokenizer as training does
    sequence_length  tokens of a row, if not the length of the run
    """
    if sequence_length is not None:
        run = replace(run, training=replace(run.training, sequence_length=sequence_length))
    with Console(stderr=True).status(shown(f"reading {run.data.source}")):
        pretrained = run.model_from and fetch(run.model_from, weights=False)
        path = directory / TOKENIZER if directory else run.data.tokenizer or pretrained
        tokenizer = open_tokenizer(path, run.model.vocab_size)
        documents, _ = split_documents(load_documents(run.data), run.data.validation_fraction)
        tokenizer = tokenizer or train_tokenizer(documents, run.model.vocab_size)
        with torch.device("meta"):  # masks and FLOPs need no weights
            model = build_model(run.model)
    images = model.image_sizes
    with closing(open_loader(run.data, run.training, documents, tokenizer, images=images, seed=run.seed)) as loader:
        batch = next(loader)
    masks = prepare_batch(model, batch, tokenizer, "cpu")["attention_masks"]
    return MaskSource(title=f"{title}, first batch", masks=masks, model=model, batch=batch)
