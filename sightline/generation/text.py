"""Text from a model, token by token: how the next token is drawn, and the loop around it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sightline.batch import IGNORE, Batch
from sightline.masks import AttentionMask, named_masks
from sightline.models.decoder import Decoder, Masks

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What decoders put where the bytes of a character have not all come."""


class Tokenizer(Protocol):
    """What generation asks of a tokenizer."""

    @property
    def eos_id(self) -> int: ...

    def encode_prompt(self, text: str) -> list[int]:
        """The beginning of a document: with its opening token where the tokenizer has one, never with the closing."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


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


DEFAULTS = SamplingConfig()


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    sampling: SamplingConfig = DEFAULTS,
    *,
    extra: dict[str, Tensor] | None = None,
) -> str:
    """The text that `stream` yields, in one piece and without the prompt."""
    return "".join(stream(model, tokenizer, prompt, sampling, extra=extra))


def stream(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    sampling: SamplingConfig = DEFAULTS,
    *,
    extra: dict[str, Tensor] | None = None,
) -> Iterator[str]:
    """Continue the prompt, piece by piece; a piece never ends inside a character.

    prompt  a text, or the token ids of the beginning of a document
    extra   what else of the prompt the model takes, as in a batch of one row: its images

    Errors: ValueError for a prompt without a token, before anything is generated.
    """
    ids = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens: give at least one character to continue")
    return _pieces(tokenizer, _continue(model, tokenizer, ids, extra or {}, sampling))


def sample(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """Draw a token from logits [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits, tokens = (logits.float() / sampling.temperature).sort(descending=True, stable=True)
    probabilities = logits[: sampling.top_k].softmax(dim=0)
    before = probabilities.cumsum(dim=0) - probabilities  # 0 for the likeliest token, so one always stays
    probabilities[before >= sampling.top_p] = 0
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def _continue(
    model: Decoder, tokenizer: Tokenizer, ids: list[int], extra: dict[str, Tensor], sampling: SamplingConfig
) -> Iterator[int]:
    """New tokens until the end of the document. Each is computed once: the cache holds what came before."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = model.new_cache()
    text, seen = list(ids), 0
    for _ in range(sampling.max_new_tokens):
        batch = _one_document(text, extra)
        new = torch.arange(seen, len(text))
        # The model's own rule for the whole text, then the rows of the new tokens: windows and chunks stay exact.
        masks = _take_queries(model, model.get_attention_masks(batch, tokenizer), new)
        tokens, positions = batch.tokens[:, new].to(device), batch.positions[:, new].to(device)
        given = {} if seen else {name: value.to(device) for name, value in extra.items()}
        logits = model(tokens, attention_masks=masks, positions=positions, cache=cache, **given)[0, -1]
        logits[list(model.suppress_tokens)] = -float("inf")
        token = sample(logits, sampling, generator)
        if token == tokenizer.eos_id:
            return
        yield token
        seen = len(text)
        text.append(token)


def _one_document(ids: list[int], extra: dict[str, Tensor]) -> Batch:
    tokens = torch.tensor([ids])
    positions = torch.arange(len(ids), dtype=torch.int32)[None]
    return Batch(
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORE),
        document_ids=torch.zeros_like(positions),
        positions=positions,
        extra=extra,
    )


def _take_queries(model: Decoder, masks: Masks, index: Tensor) -> dict[str, AttentionMask]:
    """The masks for the tokens at `index` alone; those that no decoder layer uses are not about tokens, and stay."""
    of_tokens = {layer.mask_name for layer in model.layers.values()}
    return {name: mask.take_queries(index) if name in of_tokens else mask for name, mask in named_masks(masks).items()}


def _pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of the tokens as it grows. A character whose bytes have not all come waits for them.

    The whole text is decoded each time, because some decoders write a token differently at the beginning of a text.
    """
    ids: list[int] = []
    told = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith(UNFINISHED) and len(text) > len(told):
            yield text[len(told) :]
            told = text
    rest = tokenizer.decode(ids)[len(told) :]
    if rest:
        yield rest
