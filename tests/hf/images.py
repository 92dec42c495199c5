"""Vision-language models of transformers: packed rows of documents with an image each, against each document alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

import sightline.hf
from tests.hf.isolation import TOLERANCE, Call, Outcome, Row, attempt, logits_of, relative
from tests.support.hf_models import quiet, tiny_model

# Llama 4 of transformers 5.24 reads this field of its language model's output, which does not have it.
if not hasattr(MoeCausalLMOutputWithPast, "image_outputs"):
    MoeCausalLMOutputWithPast.image_outputs = None

TOKENS_PER_IMAGE = 4
TEXT_BEFORE = (5, 9, 3)
TEXT_AFTER = 7


@dataclass(frozen=True)
class Kind:
    """How the inputs of one kind of model are made.

    pixels     [image, 3, H, W] of an image, or [patches, values]
    arguments  further arguments of a forward, from the tokens and the number of images
    positions  of a document: [S], or M-RoPE [3, S]
    """

    pixels: tuple[int, ...]
    arguments: Callable[[PreTrainedModel, Tensor, int], Call]
    has_mrope: bool = False


def gemma_arguments(model: PreTrainedModel, tokens: Tensor, images: int) -> Call:
    return {"token_type_ids": (tokens == image_token(model)).long()}


def qwen_arguments(model: PreTrainedModel, tokens: Tensor, images: int) -> Call:
    return {"image_grid_thw": torch.tensor([[1, 4, 4]] * images)}


def no_arguments(model: PreTrainedModel, tokens: Tensor, images: int) -> Call:
    return {}


KINDS = {
    "Gemma3ForConditionalGeneration": Kind((1, 3, 16, 16), gemma_arguments),
    "Llama4ForConditionalGeneration": Kind((1, 3, 16, 16), no_arguments),
    "Qwen2_5_VLForConditionalGeneration": Kind((16, 96), qwen_arguments, has_mrope=True),
    "Qwen3VLForConditionalGeneration": Kind((16, 96), qwen_arguments, has_mrope=True),
}


def image_token(model: PreTrainedModel) -> int:
    config: Any = model.config
    return getattr(config, "image_token_id", None) or config.image_token_index


class Images:
    """Three documents of text with an image each, packed and alone."""

    def __init__(self, cls: str) -> None:
        self.kind, self.eager = KINDS[cls], tiny_model(cls)
        generator = torch.Generator().manual_seed(4)
        self.documents = [self._tokens(n, generator) for n in TEXT_BEFORE]
        self.pixels = torch.randn(len(TEXT_BEFORE) * self.kind.pixels[0], *self.kind.pixels[1:], generator=generator)

    def _tokens(self, before: int, generator: torch.Generator) -> Tensor:
        config: Any = self.eager.config
        start, end = (getattr(config, f"vision_{side}_token_id", 4) for side in ("start", "end"))
        image = torch.tensor([start, *[image_token(self.eager)] * TOKENS_PER_IMAGE, end])
        text = torch.randint(5, 100, (before + TEXT_AFTER,), generator=generator)
        return torch.cat([text[:before], image, text[before:]])

    def call(self, documents: list[Tensor], pixels: Tensor) -> Call:
        tokens = torch.cat(documents)[None]
        arguments = self.kind.arguments(self.eager, tokens, len(documents))
        return {"input_ids": tokens, "pixel_values": pixels, "use_cache": False, **arguments}

    def positions(self, document: Tensor) -> Tensor:
        """Return the positions of a document, [S], or [3, S] with M-RoPE."""
        if not self.kind.has_mrope:
            return torch.arange(len(document))
        types = (document == image_token(self.eager)).int()[None]
        grid = torch.tensor([[1, 4, 4]])
        found, _ = self.eager.model.get_rope_index(document[None], types, image_grid_thw=grid)
        return found[:, 0]

    def alone(self) -> Tensor:
        """Return the logits of each document alone, concatenated: [1, S, V]."""
        pixels = self.pixels.chunk(len(self.documents))
        calls = [self.call([tokens], own) for tokens, own in zip(self.documents, pixels, strict=True)]
        positions = [self.positions(tokens) for tokens in self.documents]
        return torch.cat(
            [
                logits_of(self.eager, {**c, "position_ids": p.unsqueeze(-2)})
                for c, p in zip(calls, positions, strict=True)
            ],
            dim=1,
        )

    def packed(self) -> dict[str, Call]:
        """Return the calls of the packed row."""
        row = self.call(self.documents, self.pixels)
        text = torch.cat([torch.arange(len(tokens)) for tokens in self.documents])[None]
        ids = torch.cat([torch.full((len(tokens),), n) for n, tokens in enumerate(self.documents)])[None]
        own = torch.cat([self.positions(tokens) for tokens in self.documents], dim=-1).unsqueeze(-2)
        default = {**row, "position_ids": own, "use_cache": True}
        calls = {
            "default": default,
            "use_cache=False": {**row, "position_ids": own},
            "all-ones mask": {**default, "attention_mask": torch.ones_like(text)},
            "document_ids": {**row, "position_ids": own, "document_ids": ids},
        }
        if self.kind.has_mrope:
            calls["text positions first"] = {**row, "position_ids": torch.cat([text[None], own])}
        return calls


def check_images(cls: str) -> Row:
    """Check packed rows with images, without `enable` and with it; `stock` has relative errors of eager and sdpa."""
    row = Row(cls, "with images")
    with quiet():
        rows = Images(cls)
        expected = rows.alone()

        def check(model: PreTrainedModel, call: Call) -> Outcome:
            error = relative(logits_of(model, call), expected)
            return Outcome("right" if error <= TOLERANCE else leak(rows, model, call), error)

        for implementation, name in (("eager", "default"), ("sdpa", "use_cache=False"), ("sdpa", "all-ones mask")):
            model = tiny_model(cls, attn_implementation=implementation)
            row.stock[f"{implementation}, {name}"] = relative(logits_of(model, rows.packed()[name]), expected)
        alone = tiny_model(cls, attn_implementation={"text_config": "sightline", "vision_config": "sdpa"})
        enabled = sightline.hf.enable(tiny_model(cls))
        for name, call in rows.packed().items():
            known = {key: value for key, value in call.items() if key != "document_ids"}
            eager = partial(logits_of, rows.eager, known)
            row.enabled[name] = attempt(partial(check, enabled, call), eager)
            if name != "document_ids":
                row.name_alone[name] = attempt(partial(check, alone, call), eager)
    return row


def leak(rows: Images, model: PreTrainedModel, call: Call) -> str:
    """Return LEAK if later documents change with a token or the image of the first one, otherwise WRONG."""
    first = len(rows.documents[0])
    tokens, pixels = call["input_ids"].clone(), call["pixel_values"].clone()
    tokens[0, 2] = 101
    pixels[: rows.kind.pixels[0]] += 1
    before = logits_of(model, call)[:, first:]
    changes = [{"input_ids": tokens}, {"pixel_values": pixels}]
    moved = max(relative(logits_of(model, {**call, **change})[:, first:], before) for change in changes)
    return "LEAK" if moved > TOLERANCE else "WRONG"
