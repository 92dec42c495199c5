"""Text generation from one prompt or a batch of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import Tensor

from sightline.generation.masks import Prompt
from sightline.generation.sampling import SamplingConfig
from sightline.generation.tokens import Tokenizer, generate_tokens
from sightline.models.decoder import Decoder

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""Character that tokenizers decode an incomplete UTF-8 sequence to."""

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
    return generate_batch(model, tokenizer, [prompt], sampling, extras=[extra or {}])[0]


def generate_batch(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    sampling: SamplingConfig = DEFAULTS,
    *,
    extras: Sequence[dict[str, Tensor]] | None = None,
) -> list[str]:
    """Return the generated text of each prompt, without the prompt; prompts may differ in length.

    The text of prompt i is that of `generate` with seed + i, except for the rounding of products of several rows.

    extras  further model inputs of each prompt, as `extra` of `stream`

    Raises:
        ValueError: if a prompt has no tokens, or `extras` has another length than `prompts`.
    """
    encoded = _encode(tokenizer, prompts, extras)
    texts: list[list[int]] = [[] for _ in encoded]
    if encoded:
        for new in generate_tokens(model, tokenizer, encoded, sampling):
            for row, token in new.items():
                texts[row].append(token)
    return [tokenizer.decode(ids) for ids in texts]


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
    encoded = _encode(tokenizer, [prompt], [extra or {}])
    steps = generate_tokens(model, tokenizer, encoded, sampling)
    return _decode_stream(tokenizer, (token for new in steps for token in new.values()))


def _encode(
    tokenizer: Tokenizer, prompts: Sequence[str | Sequence[int]], extras: Sequence[dict[str, Tensor]] | None
) -> list[Prompt]:
    if isinstance(prompts, str):
        raise ValueError(f"expected a list of prompts, got the text {prompts!r}; use generate() for one prompt")
    if extras is not None and len(extras) != len(prompts):
        raise ValueError(
            f"got {len(extras)} extras for {len(prompts)} prompts; expected one for each, {{}} for a prompt without"
        )
    encoded = []
    for prompt, extra in zip(prompts, extras or [{}] * len(prompts), strict=True):
        ids = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise ValueError(f"the prompt {prompt!r} has no tokens; expected at least one character")
        encoded.append(Prompt(ids, extra))
    return encoded


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
