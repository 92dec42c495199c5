"""Attention masks of the tokens that will be generated, built once for all steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.batch import IGNORE, Batch
from sightline.masks import AttentionMask, named_masks
from sightline.models.decoder import Decoder, Masks


class Prompt(NamedTuple):
    """The token ids of a prompt, and further model inputs such as images, as the `extra` of a batch of one row."""

    ids: list[int]
    extra: dict[str, Tensor]


def prompt_masks(model: Decoder, tokenizer: object, prompt: Prompt) -> Masks:
    """Return the model's masks for a prompt."""
    return model.get_attention_masks(one_document(prompt.ids, prompt.extra), tokenizer)


class StepMasks:
    """Masks of one new token per row and step, for rows whose prompts end in the same column.

    The masks are those of each row alone, with placeholders for the tokens that are not known yet. The columns of a row
    are its tokens, after `padding` columns that no query attends to.
    """

    def __init__(self, model: Decoder, tokenizer: object, prompts: Sequence[Prompt], steps: int) -> None:
        self.width = max(len(prompt.ids) for prompt in prompts)
        """Column of the first new token."""
        token = next(i for i in range(len(model.suppress_tokens) + 1) if i not in model.suppress_tokens)
        rows = [new_token_masks(model, tokenizer, prompt, [token] * steps) for prompt in prompts]
        self.padding = [self.width - len(prompt.ids) for prompt in prompts]
        self._alone = rows
        self._intervals = {name: self._join([row[name] for row in rows]) for name in rows[0]}
        self._find_needed()

    def _join(self, masks: Sequence[AttentionMask]) -> tuple[Tensor, Tensor]:
        """Return start and stop [B, steps, K] in columns; a query attends to no column after its own."""
        intervals = max(mask.intervals for mask in masks)
        index = torch.arange(self.width + 1, self.width + 1 + masks[0].shape[1], dtype=torch.int32)[:, None]
        bounds = []
        for mask, padding in zip(masks, self.padding, strict=True):
            start, stop = mask.start + padding, (mask.stop + padding).minimum(index)
            empty = (mask.stop <= mask.start) | (stop <= start)
            bounds.append([F.pad(t.masked_fill(empty, 0), (0, intervals - mask.intervals)) for t in (start, stop)])
        start, stop = (torch.cat(side) for side in zip(*bounds, strict=True))
        return start, stop

    def _find_needed(self) -> None:
        """Find the first column that any query of a step or of a later step attends to, for each mask."""
        self._needed = {}
        for name, (start, stop) in self._intervals.items():
            first = start.masked_fill(stop <= start, torch.iinfo(torch.int32).max).amin(dim=(0, 2))
            self._needed[name] = first.flip(0).cummin(0).values.flip(0).tolist()

    def select(self, rows: Tensor) -> None:
        """Keep the rows at these indices, int64 [B']."""
        self._intervals = {name: (start[rows], stop[rows]) for name, (start, stop) in self._intervals.items()}
        self._find_needed()

    def first_column(self, name: str, step: int) -> int:
        """Return the first column that a query of this step or of a later one attends to."""
        return min(self._needed[name][step], self.width + step)

    def at(self, step: int) -> dict[str, AttentionMask]:
        """Return the masks of one query per row; key 0 is the column `first_column`."""
        masks = {}
        for name, (start, stop) in self._intervals.items():
            first, length = self.first_column(name, step), self.width + step + 1
            start, stop = start[:, step : step + 1], stop[:, step : step + 1]
            if first:
                masks[name] = AttentionMask.from_intervals(start - first, stop - first, length - first)
            else:
                masks[name] = AttentionMask(start, stop, length)
        return masks

    def check(self, model: Decoder, tokenizer: object, row: int, prompt: Prompt, new: Sequence[int]) -> None:
        """Check that the masks of a finished row do not depend on the generated tokens.

        row  index of the row among all prompts

        Raises:
            ValueError: if they do.
        """
        index = torch.arange(len(new))
        for name, mask in new_token_masks(model, tokenizer, prompt, new).items():
            used = self._alone[row][name].take_queries(index)
            stop = used.stop.clamp(max=mask.key_length)
            if not AttentionMask.from_intervals(used.start, stop, mask.key_length).equal(mask):
                raise ValueError(
                    f"the mask {name!r} of a {type(model).__name__} depends on the generated tokens, but generation "
                    "builds it before they are known; let get_attention_masks use document_ids, positions and the "
                    "tokens of the prompt only"
                )


def new_token_masks(model: Decoder, tokenizer: object, prompt: Prompt, new: Sequence[int]) -> dict[str, AttentionMask]:
    """Return the masks of the decoder layers for the text of a prompt and new tokens: the queries of the new tokens."""
    batch = one_document([*prompt.ids, *new], prompt.extra)
    index = torch.arange(len(prompt.ids), batch.shape[1])
    names = {layer.mask_name for layer in model.layers.values()}
    masks = named_masks(model.get_attention_masks(batch, tokenizer))
    return {name: mask.cpu().take_queries(index) for name, mask in masks.items() if name in names}


def one_document(ids: list[int], extra: dict[str, Tensor]) -> Batch:
    """Return a batch of one row with one document."""
    tokens = torch.tensor([ids])
    positions = torch.arange(len(ids), dtype=torch.int32)[None]
    return Batch(
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORE),
        document_ids=torch.zeros_like(positions),
        positions=positions,
        extra=extra,
    )
