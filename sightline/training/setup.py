"""What a run stands on before its first step: device, random numbers, tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sightline import config
from sightline.data import Documents, Tokenizer, load_tokenizer, train_tokenizer


def choose_device(options: config.TrainingConfig) -> torch.device:
    """The device `training.device` means here. Errors: ValueError where it asks for CUDA and there is none."""
    has_cuda = torch.cuda.is_available()
    if options.device == "cuda" and not has_cuda:
        raise ValueError(
            "training.device is 'cuda', but PyTorch finds no CUDA device; use --training.device cpu or auto, or "
            "install a PyTorch build for CUDA"
        )
    return torch.device("cuda" if has_cuda and options.device != "cpu" else "cpu")


def make_reproducible(seed: int, deterministic: bool) -> None:
    """Seed everything, and hold PyTorch to deterministic algorithms where the run wants that."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS demands it, and reads it when it starts
    torch.use_deterministic_algorithms(deterministic)
    torch.manual_seed(seed)


def get_tokenizer(path: Path | None, documents: Documents, vocab_size: int) -> Tokenizer:
    """The tokenizer at `path`, or without one a new one, trained on the documents.

    Errors: ValueError where the model's `vocab_size` has no room for it, or there is nothing to train one on.
    """
    if path is None:
        if not documents:
            raise ValueError(
                f"{documents.source} hold no text to train a tokenizer on; name the tokenizer they were made with: "
                "data.tokenizer, or model_from"
            )
        return train_tokenizer(documents, vocab_size)
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"the tokenizer {path} has {tokenizer.vocab_size} tokens and the model's vocabulary has {vocab_size}; "
            f"expected at most as many. Use --model.vocab-size {tokenizer.vocab_size}"
        )
    return tokenizer
