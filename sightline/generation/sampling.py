"""How the next token is drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How much text is drawn, and how."""

    max_new_tokens: int = 128
    """Tokens to add at most; it ends before that where the model ends the document."""
    temperature: float = 0.8
    """Under 1 likely tokens become likelier; 0 always takes the likeliest."""
    top_k: int | None = None
    """Draw from the k likeliest tokens only."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities reach p."""
    seed: int = 0
    """The same seed draws the same text."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"max-new-tokens must be at least 0, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (always the likeliest token) or greater, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k must be at least 1 token, got {self.top_k}; leave it out to draw from all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p must be greater than 0 and at most 1 (all tokens), got {self.top_p}")


def sample(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """Draw a token from logits [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits, tokens = (logits.float() / sampling.temperature).sort(descending=True, stable=True)
    probabilities = logits[: sampling.top_k].softmax(dim=0)
    before = probabilities.cumsum(dim=0) - probabilities  # 0 for the likeliest token, so one always stays
    probabilities[before >= sampling.top_p] = 0
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
