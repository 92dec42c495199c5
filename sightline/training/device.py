"""The device of a run, and its random seeds."""

from __future__ import annotations

import os

import torch

from sightline.config import TrainingConfig


def choose_device(options: TrainingConfig) -> torch.device:
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
