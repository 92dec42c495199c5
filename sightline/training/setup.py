"""What a run stands on before its first step: device, random numbers, tokenizer, batches."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sightline import config
from sightline.batch import Batch
from sightline.config import Run
from sightline.data import Documents, Loader, Tokenizer, load_tokenizer, train_tokenizer, validation_batches
from sightline.training.checkpoint import TOKENIZER


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
    """The tokenizer of the checkpoint, else the one the config names, else one trained on the documents.

    Errors: ValueError where the model has no room for its vocabulary.
    """
    if start:
        return load_tokenizer(start / TOKENIZER)
    if run.data.tokenizer is None:
        return train_tokenizer(documents, run.model.vocab_size)
    tokenizer = load_tokenizer(run.data.tokenizer)
    if tokenizer.vocab_size > run.model.vocab_size:
        raise ValueError(
            f"the tokenizer {run.data.tokenizer} has {tokenizer.vocab_size} tokens and the model's vocabulary has "
            f"{run.model.vocab_size}; expected at most as many. Use --model.vocab-size {tokenizer.vocab_size}"
        )
    return tokenizer


def open_loader(run: Run, documents: Documents, tokenizer: Tokenizer) -> Loader:
    """The batches to train on, all rows of an optimizer step each."""
    return Loader(
        documents,
        tokenizer,
        rows=run.training.global_batch_size,
        sequence_length=run.training.sequence_length,
        packing=run.data.packing,
        seed=run.seed,
    )


def open_validation(run: Run, documents: Documents, tokenizer: Tokenizer) -> list[Batch]:
    """The batches to validate on, always the same; none where the run does not validate."""
    if run.validation.every == 0 or len(documents) == 0:
        return []
    return list(
        validation_batches(
            documents,
            tokenizer,
            rows=run.validation.rows,
            rows_per_batch=run.training.micro_batch_size,
            sequence_length=run.training.sequence_length,
        )
    )
