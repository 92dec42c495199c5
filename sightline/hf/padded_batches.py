"""Padded batches of TRL, packed before the model runs, so that beginnings that sequences share are computed once.

The trainers of TRL ask their model for the log-probabilities of a padded batch, with `fused_lm_head=True`. A hook
before the model packs the sequences, without padding and with shared beginnings once. A hook after it puts each value
back in its place in the batch. Tried with TRL 1.16.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sightline.batch import IGNORE
from sightline.hf.groups import SHORTEST_SHARED, GroupedRows, build_rows, pack_sequences
from sightline.torch_private import disable_compiler

PACKED = ("input_ids", "attention_mask", "labels")
KEPT = ("fused_lm_head", "use_cache", "output_router_logits")
SHARED = "_sightline_shared"


@dataclass
class _Shared:
    """Hooks of a model, and the rows of its forwards that run; None: a forward that is not packed."""

    handles: list[RemovableHandle]
    running: list[GroupedRows | None] = field(default_factory=list)


def pack_batches(model: nn.Module) -> None:
    """Let a model pack the padded batches of TRL. The hooks hold no module, so that a deep copy has working ones."""
    if SHARED not in vars(model):
        before = model.register_forward_pre_hook(_pack, prepend=True, with_kwargs=True)
        vars(model)[SHARED] = _Shared([before, model.register_forward_hook(_unpack, always_call=True)])


def restore_batches(model: nn.Module) -> None:
    """Undo `pack_batches`."""
    if (shared := vars(model).pop(SHARED, None)) is not None:
        for handle in shared.handles:
            handle.remove()


@disable_compiler
def _pack(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Replace a padded batch by packed rows; other calls, such as those of `generate`, stay as they are."""
    rows = None
    if kwargs.get("fused_lm_head"):
        given = {name: value for name, value in kwargs.items() if value is not None}
        if args or given.keys() - {*PACKED, *KEPT} or set(PACKED) - given.keys():
            raise ValueError(
                f"share_prompts packs batches of {', '.join(PACKED)} only, got {', '.join(given)}; train without it"
            )
        device = given["input_ids"].device
        rows, counts = pack_batch(*(given[name] for name in PACKED))
        kwargs = {name: given[name] for name in KEPT if name in given}
        kwargs |= {**rows.inputs(device), "shift_labels": rows.labels.to(device)}
        if given.get("output_router_logits"):
            kwargs["attention_mask"] = counts.to(device)  # the weights of the router's auxiliary loss
    vars(module)[SHARED].running.append(rows)
    return args, kwargs


def _unpack(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Return the output with the values of the padded batch [N, L - 1] in place of those of packed tokens [B, S].

    There is no loss: a packed token belongs to several sequences.
    """
    running = vars(module)[SHARED].running
    rows = running.pop() if running else None  # there is none if the hook before the forward has raised
    if rows is None or output is None:
        return output
    values = {name: rows.gather(x) if x.shape == rows.labels.shape else x for name, x in output.items()}
    return type(output)(**(values | {"loss": None}))


def pack_batch(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> tuple[GroupedRows, Tensor]:
    """Return the rows of a padded batch [N, L], with an index [N, L - 1] as TRL shifts labels.

    The second result, float32 [B, S], is how often the batch has each packed token.

    Raises:
        ValueError: if a label is not the token at its place.
    """
    tokens, real, labels = input_ids.cpu(), attention_mask.cpu().bool(), labels.cpu()
    scored = real & (labels != IGNORE)
    if bool((tokens != labels)[scored].any()):
        raise ValueError("share_prompts needs labels that are the tokens themselves, or -100")
    sequences = [tuple(row[keep].tolist()) for row, keep in zip(tokens, real, strict=True)]
    rows, places = pack_sequences(sequences, None, SHORTEST_SHARED)
    predicted_by = torch.full(tokens.shape, -1)
    for row, keep, place in zip(predicted_by, real, places, strict=True):
        columns = keep.nonzero().flatten()
        row[columns[1:]] = place[:-1]
    index = predicted_by.masked_fill(~scored, -1)[:, 1:]
    targets = tokens[:, 1:][index >= 0]
    packed = build_rows(rows, index, targets.tolist())
    counts = torch.cat(places).bincount(minlength=packed.labels.numel())
    return packed, counts.view(packed.labels.shape).float()
