"""share_prompts(): let TRL's trainers compute each prompt once, whose batches repeat it in every row.

The trainers of TRL ask their model for the log-probabilities of a padded batch, with `fused_lm_head=True`. A hook
before the model packs the sequences, without padding and with shared beginnings once. A hook after it puts each value
back in its place in the batch. Tried with TRL 1.16.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sightline.batch import IGNORE
from sightline.hf.enable import enable, is_enabled, models_in, record_of
from sightline.hf.groups import SHORTEST_SHARED, GroupedRows, build_rows, pack_sequences
from sightline.torch_private import disable_compiler

if TYPE_CHECKING:
    from transformers import Trainer

TRAINERS = {"GRPOTrainer", "RLOOTrainer", "DPOTrainer", "KTOTrainer"}
PACKED = ("input_ids", "attention_mask", "labels")
KEPT = ("fused_lm_head", "use_cache", "output_router_logits")


def share_prompts(trainer: Trainer) -> None:
    """Let a trainer of TRL (GRPO, RLOO, DPO, KTO) compute each prompt once, in its model and its reference model.

    Call it once before `trainer.train()`. It enables the models. Losses, gradients and metrics stay those of the padded
    batch. Only sequences of one batch on one process share prompts: GRPO shuffles the responses of the batches that it
    generates at a time, so keep `steps_per_generation=1` and let `per_device_train_batch_size` be a multiple of
    `num_generations`. `sightline.hf.disable(model)` reverts it.

    Raises:
        ValueError: if it is another trainer, or a version of TRL that computes log-probabilities in another way.
    """
    if not TRAINERS & {cls.__name__ for cls in type(trainer).__mro__}:
        raise ValueError(f"share_prompts is for TRL's {', '.join(sorted(TRAINERS))}, got a {type(trainer).__name__}")
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is None:
            continue
        if not any(_has_fused_head(inner) for inner in models_in(model)):
            raise ValueError(
                f"share_prompts: {type(trainer).__name__} has not added a fused output head to {type(model).__name__}: "
                "this version of TRL is not supported; use TRL 1.16"
            )
        if not is_enabled(model):
            enable(model)
        record = record_of(model)
        if record.packed is None:
            record.packed = []
            record.handles.append(model.register_forward_pre_hook(_pack, prepend=True, with_kwargs=True))
            record.handles.append(model.register_forward_hook(_unpack, always_call=True))


def _has_fused_head(model: nn.Module) -> bool:
    def takes_flag(function: Any) -> bool:
        return "fused_lm_head" in inspect.signature(function, follow_wrapped=False).parameters

    return takes_flag(inspect.unwrap(model.forward, stop=takes_flag))


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
    packed = record_of(module).packed
    assert packed is not None, "share_prompts has set it"
    packed.append(rows)
    return args, kwargs


def _unpack(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Return the output with the values of the padded batch [N, L - 1] in place of those of packed tokens [B, S].

    There is no loss: a packed token belongs to several sequences.
    """
    packed = record_of(module).packed
    rows = packed.pop() if packed else None  # there is none if the hook before the forward has raised
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
