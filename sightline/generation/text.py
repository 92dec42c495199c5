"""Text generation: sampling of the next token, and the generation loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sightline.batch import IGNORE, Batch
from sightline.config.checks import check_seed
from sightline.masks import AttentionMask, named_masks
from sightline.models.decoder import Decoder, Masks

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Character that tokenizers decode an incomplete UTF-8 sequence to."""


class Tokenizer(Protocol):
    """Tokenizer methods that generation uses."""

    @property
    def eos_id(self) -> int: ...

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of the beginning of a document: with a begin token if there is one, without an end token."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


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
    """Random seed of the sampling."""

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


DEFAULTS = SamplingConfig()


def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    sampling: SamplingConfig = DEFAULTS,
    *,
    extra: dict[str, Tensor] | None = None,
) -> str:
    """Return the generated text, without the prompt. Arguments and errors are those of `stream`."""
    return "".join(stream(model, tokenizer, prompt, sampling, extra=extra))


def stream(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    sampling: SamplingConfig = DEFAULTS,
    *,
    extra: dict[str, Tensor] | None = None,
) -> Iterator[str]:
    """Yield the generated text in pieces that never split a character.

    prompt  a text, or the token ids of the beginning of a document
    extra   further model inputs of the prompt, such as images, as the `extra` of a batch of one row

    Raises:
        ValueError: if the prompt has no tokens; raised by the call, before the iteration.
    """
    ids = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens; expected at least one character")
    return _decode_stream(tokenizer, _generate_tokens(model, tokenizer, ids, extra or {}, sampling))


def sample(logits: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> int:
    """Sample a token from logits [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits, tokens = (logits.float() / sampling.temperature).sort(descending=True, stable=True)
    probabilities = logits[: sampling.top_k].softmax(dim=0)
    before = probabilities.cumsum(dim=0) - probabilities  # 0 for the most likely token, so at least one remains
    probabilities[before >= sampling.top_p] = 0
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def _generate_tokens(
    model: Decoder, tokenizer: Tokenizer, ids: list[int], extra: dict[str, Tensor], sampling: SamplingConfig
) -> Iterator[int]:
    """Yield new tokens until the end of the document. Each forward computes only tokens that are not in the cache."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache = model.new_cache()
    ids, num_cached = list(ids), 0
    for _ in range(sampling.max_new_tokens):
        batch = _one_document(ids, extra)
        new = torch.arange(num_cached, len(ids))
        # Masks of the full text, restricted to the queries of the new tokens: correct for windows and chunks too.
        masks = _take_queries(model, model.get_attention_masks(batch, tokenizer), new)
        tokens, positions = batch.tokens[:, new].to(device), batch.positions[:, new].to(device)
        inputs = {} if num_cached else {name: value.to(device) for name, value in extra.items()}
        logits = model(tokens, attention_masks=masks, positions=positions, cache=cache, **inputs)[0, -1]
        logits[list(model.suppress_tokens)] = -float("inf")
        token = sample(logits, sampling, generator)
        if token == tokenizer.eos_id:
            return
        yield token
        num_cached = len(ids)
        ids.append(token)


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
    """Restrict the masks of decoder layers to the queries at `index`; other masks (of images) do not change."""
    decoder_masks = {layer.mask_name for layer in model.layers.values()}
    return {
        name: mask.take_queries(index) if name in decoder_masks else mask for name, mask in named_masks(masks).items()
    }


def _decode_stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """Yield the text of the tokens in pieces. A character with missing bytes is held back until it is complete.

    All tokens are decoded each time, because some tokenizers decode a token differently at the beginning of a text.
    """
    ids: list[int] = []
    yielded = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith(INCOMPLETE) and len(text) > len(yielded):
            yield text[len(yielded) :]
            yielded = text
    rest = tokenizer.decode(ids)[len(yielded) :]
    if rest:
        yield rest
