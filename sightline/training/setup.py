"""What a run stands on before its first step: device, random numbers, tokenizer, batches."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path

import torch

from sightline import config
from sightline.batch import IGNORE, Batch
from sightline.config import Run
from sightline.data import (
    SYNTHETIC_IMAGES,
    Documents,
    ImageLoader,
    Loader,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
    validation_batches,
)
from sightline.training.checkpoint import TOKENIZER

VALIDATION_SEED = 0  # any constant: a run's seed must not change what it is validated on


def choose_device(options: config.Training) -> torch.device:
    """The device `training.device` means here.

    Errors: ValueError where it asks for CUDA and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise ValueError(
            "training.device is 'cuda', but PyTorch finds no CUDA device; use --training.device cpu or auto, or "
            "install a PyTorch build for CUDA"
        )
    return torch.device("cuda" if has_cuda and options.device != "cpu" else "cpu")


def make_reproducible(run: Run) -> None:
    """Seed everything, and hold PyTorch to deterministic algorithms where the run wants that."""
    if run.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS demands it, and reads it when it starts
    torch.use_deterministic_algorithms(run.training.deterministic)
    torch.manual_seed(run.seed)


def get_tokenizer(run: Run, documents: Documents, start: Path | None) -> Tokenizer:
    """The tokenizer of the checkpoint, else the one the config names, else that of the pretrained weights, else one
    trained on the documents.

    Errors: ValueError where the model has no room for its vocabulary.
    """
    if start:
        return load_tokenizer(start / TOKENIZER)
    path = run.data.tokenizer or run.model_from
    if path is None:
        return train_tokenizer(documents, run.model.vocab_size)
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ValueError(
            f"the tokenizer {path} has {tokenizer.vocab_size} tokens and the model's vocabulary has "
            f"{run.model.vocab_size}; expected at most as many. Use --model.vocab-size {tokenizer.vocab_size}"
        )
    return tokenizer


def open_loader(
    run: Run, documents: Documents, tokenizer: Tokenizer, *, rank: int = 0, world: int = 1
) -> Loader | ImageLoader:
    """The batches to train on: of all rows of an optimizer step, those of one of `world` data-parallel ranks."""
    rows = run.training.global_batch_size
    if run.data.source == SYNTHETIC_IMAGES:
        return open_images(run, documents, tokenizer, rows=rows, seed=run.seed, rank=rank, world=world)
    return Loader(
        documents,
        tokenizer,
        rows=rows,
        sequence_length=run.training.sequence_length,
        packing=run.data.packing,
        seed=run.seed,
        rank=rank,
        world=world,
    )


def open_validation(
    run: Run, documents: Documents, tokenizer: Tokenizer, *, rank: int = 0, world: int = 1
) -> list[Batch]:
    """The batches to validate on, always the same; none where the run does not validate. Ranks share the rows."""
    if run.validation.every == 0 or len(documents) == 0:
        return []
    if run.data.source == SYNTHETIC_IMAGES:
        rows, at_once = run.validation.rows, run.training.micro_batch_size
        with closing(
            open_images(run, documents, tokenizer, rows=rows, seed=VALIDATION_SEED, rank=0, world=1)
        ) as images:
            whole = next(images)
        share = -(-rows // world)
        index = torch.arange(rank * share, (rank + 1) * share)
        mine = whole[index.clamp(max=rows - 1)]
        mine.labels[index >= rows] = IGNORE  # every rank has as many rows
        return [mine[first : first + at_once] for first in range(0, share, at_once)]
    return list(
        validation_batches(
            documents,
            tokenizer,
            rows=run.validation.rows,
            rows_per_batch=run.training.micro_batch_size,
            sequence_length=run.training.sequence_length,
            rank=rank,
            world=world,
        )
    )


def open_images(
    run: Run, captions: Documents, tokenizer: Tokenizer, *, rows: int, seed: int, rank: int, world: int
) -> ImageLoader:
    """Batches of drawings and their captions.

    Errors: ValueError for a model that sees no images.
    """
    if not hasattr(run.model, "image_token"):
        raise ValueError(
            f"data.source {SYNTHETIC_IMAGES!r} holds images, and a {type(run.model).__name__} describes a model that "
            "reads text alone; take a recipe of the family vlm, or another --data.source"
        )
    return ImageLoader(
        captions,
        tokenizer,
        rows=rows,
        sequence_length=run.training.sequence_length,
        patch_size=run.model.vision.patch_size,
        merge=run.model.merge,
        image_token=run.model.image_token,
        seed=seed,
        rank=rank,
        world=world,
    )
