"""Set up a run before its first step: device, random seeds, tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sightline import config
from sightline.data import Documents, Tokenizer, load_tokenizer, train_tokenizer


def choose_device(options: config.TrainingConfig) -> torch.device:
    """Return the device for `training.device`.

    Raises:
        ValueError: if it is CUDA and no CUDA device is available.
    """
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise ValueError(
            "training.device is 'cuda', but PyTorch finds no CUDA device; use --training.device cpu or auto, or "
            "install a PyTorch build for CUDA"
        )
    return torch.device("cuda" if has_cuda and options.device != "cpu" else "cpu")


def make_reproducible(seed: int, deterministic: bool) -> None:
    """Set the seed of all random number generators, and PyTorch's deterministic algorithms if requested."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it and reads it at its first use
    torch.use_deterministic_algorithms(deterministic)
    torch.manual_seed(seed)


def get_tokenizer(path: Path | None, documents: Documents, vocab_size: int) -> Tokenizer:
    """Load the tokenizer at `path`; without a path, train one on the documents.

    Raises:
        ValueError: if the tokenizer is larger than `vocab_size`, or there are no documents to train on.
    """
    if path is None:
        if not documents:
            raise ValueError(
                f"{documents.source} have no text to train a tokenizer on; set the tokenizer they were encoded with: "
                "data.tokenizer or model_from"
            )
        return train_tokenizer(documents, vocab_size)
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.vocab_size} tokens, but the vocabulary of the model has only {vocab_size}; "
            f"use --model.vocab-size {tokenizer.vocab_size}"
        )
    return tokenizer
