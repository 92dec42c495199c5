"""Sampling of the next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sightline.config.checks import check_seed


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling options of text generation."""

    max_new_tokens: int = 128
    """Maximum number of tokens to generate; generation stops earlier at the end of the document."""
    temperature: float = 0.8
    """Sampling temperature; 0 is greedy decoding."""
    top_k: int | None = None
    """Sample only from the k most likely tokens."""
    top_p: float = 1.0
    """Nucleus sampling: sample from the smallest set of most likely tokens whose probabilities sum to at least p."""
    seed: int = 0
    """Random seed of the sampling; prompt number i of a batch, from 0, uses seed + i."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"max-new-tokens must be at least 0, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy decoding) or greater, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k must be at least 1 token, got {self.top_k}; omit it to sample from all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be greater than 0 and at most 1 (all tokens), got {self.top_p}")
        check_seed("seed", self.seed)


def sample_batch(logits: Tensor, sampling: SamplingConfig, generators: Sequence[torch.Generator]) -> list[int]:
    """Sample a token from each row of logits [B, V], with the generator of the row."""
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    return [sample(row, sampling, generator) for row, generator in zip(logits, generators, strict=True)]


def sample(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """Sample a token from logits [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits, tokens = (logits.float() / sampling.temperature).sort(descending=True, stable=True)
    probabilities = logits[: sampling.top_k].softmax(dim=0)
    before = probabilities.cumsum(dim=0) - probabilities  # 0 for the most likely token, so at least one remains
    probabilities[before >= sampling.top_p] = 0
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
