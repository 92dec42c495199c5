"""The generation loop: new tokens of a batch of prompts, one token per row and step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sightline.generation.masks import Prompt, StepMasks, one_document
from sightline.generation.sampling import SamplingConfig, sample_batch
from sightline.layers.cache import LayerCache, stack_caches
from sightline.models.decoder import Decoder


class Tokenizer(Protocol):
    """Tokenizer methods that generation uses."""

    @property
    def eos_id(self) -> int: ...

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of the beginning of a document: with a begin token if there is one, without an end token."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...


@torch.no_grad()
def generate_tokens(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[Prompt], sampling: SamplingConfig
) -> Iterator[dict[int, int]]:
    """Yield the new tokens of each step, {prompt index: token}, until all documents have ended.

    A row leaves the batch when its document ends. Its tokens do not depend on the other rows, except for rounding.
    """
    if sampling.max_new_tokens == 0:
        return
    device = next(model.parameters()).device
    generators = [torch.Generator(device).manual_seed((sampling.seed + i) % 2**64) for i in range(len(prompts))]
    masks = StepMasks(model, tokenizer, prompts, sampling.max_new_tokens)
    lengths = torch.tensor([len(prompt.ids) for prompt in prompts], dtype=torch.int32)[:, None]
    logits, cache = prefill(model, tokenizer, prompts, device)
    active, texts = list(range(len(prompts))), [[] for _ in prompts]  # type: list[int], list[list[int]]
    for step in range(sampling.max_new_tokens):
        if model.suppress_tokens:
            logits[:, list(model.suppress_tokens)] = -torch.inf
        tokens = sample_batch(logits, sampling, generators)
        kept = [i for i, token in enumerate(tokens) if token != tokenizer.eos_id]
        new = {active[i]: tokens[i] for i in kept}
        for row, token in new.items():
            texts[row].append(token)
        if new:
            yield new
        if not new or step + 1 == sampling.max_new_tokens:
            break
        if len(kept) < len(active):
            index = torch.tensor(kept)
            active, generators = [active[i] for i in kept], [generators[i] for i in kept]
            lengths = lengths[index]
            masks.select(index)
            for layer_cache in cache.values():
                layer_cache.select(index.to(device))
        logits = decode_step(model, masks, cache, list(new.values()), lengths + step, step, device)
    for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        masks.check(model, tokenizer, row, prompt, text)


def prefill(
    model: Decoder, tokenizer: Tokenizer, prompts: Sequence[Prompt], device: torch.device
) -> tuple[Tensor, dict[str, LayerCache]]:
    """Return the logits of the next tokens [B, V], and the caches of all rows.

    Each prompt is one forward, so no padding is computed.
    """
    logits, caches = [], []
    for prompt in prompts:
        batch, cache = one_document(prompt.ids, prompt.extra), model.new_cache()
        extra = {name: value.to(device) for name, value in prompt.extra.items()}
        out = model(
            batch.tokens.to(device),
            attention_masks=model.get_attention_masks(batch, tokenizer),
            positions=batch.positions.to(device),
            cache=cache,
            last_token_only=True,
            **extra,
        )
        logits.append(out[:, -1])
        caches.append(cache)
    return torch.cat(logits), stack_caches(caches)


def decode_step(
    model: Decoder,
    masks: StepMasks,
    cache: dict[str, LayerCache],
    tokens: list[int],
    positions: Tensor,
    step: int,
    device: torch.device,
) -> Tensor:
    """Return the logits of the next tokens [B, V] after one new token per row.

    tokens     the new tokens, of which `step` is the number since the prompt, from 0
    positions  int32 [B, 1], of the new tokens
    """
    for name, layer_cache in cache.items():
        layer_cache.drop_first(masks.first_column(model.layers[name].mask_name, step))  # type: ignore[arg-type]
    return model(
        torch.tensor(tokens)[:, None].to(device),
        attention_masks=masks.at(step),
        positions=positions.to(device),
        cache=cache,
        last_token_only=True,
    )[:, -1]
