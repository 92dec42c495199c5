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

PACKED = {"input_ids", "attention_mask", "labels"}
KEPT = {"fused_lm_head", "use_cache", "num_items_in_batch"}


def share_prompts(trainer: Trainer) -> None:
    """Let a trainer of TRL (GRPO, RLOO, DPO, KTO) compute each prompt once, in its model and its reference model.

    Call it once before `trainer.train()`. It enables the models. Losses, gradients and metrics stay those of the padded
    batch. Only sequences of one batch on one process share prompts: GRPO shuffles the responses of the batches that it
    generates at a time, so keep `steps_per_generation=1` and let `per_device_train_batch_size` be a multiple of
    `num_generations`. `sightline.hf.disable(model)` reverts it.

    Raises:
        ValueError: if the trainer does not use TRL's fused output head, or needs an auxiliary loss of a router.
    """
    if getattr(trainer, "aux_loss_enabled", False):
        raise ValueError(
            "share_prompts: the auxiliary loss of the router would count each prompt once, not once for each response; "
            "set output_router_logits=False in the model's config"
        )
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is None:
            continue
        if not any(_has_fused_head(inner) for inner in models_in(model)):
            raise ValueError(
                f"share_prompts: {type(trainer).__name__} has not added TRL's fused output head to "
                f"{type(model).__name__}; it needs a GRPOTrainer, RLOOTrainer, DPOTrainer or KTOTrainer of TRL 1.16"
            )
        if not is_enabled(model):
            enable(model)
        record = record_of(model)
        if record.packed is None:
            record.packed = []
            record.handles.append(model.register_forward_pre_hook(_pack, prepend=True, with_kwargs=True))
            record.handles.append(model.register_forward_hook(_unpack, with_kwargs=True, always_call=True))


def _has_fused_head(model: nn.Module) -> bool:
    def takes_flag(function: Any) -> bool:
        return "fused_lm_head" in inspect.signature(function, follow_wrapped=False).parameters

    return takes_flag(inspect.unwrap(model.forward, stop=takes_flag))


@disable_compiler
def _pack(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Replace a padded batch by packed rows; other calls, such as those of `generate`, stay as they are."""
    rows = None
    if kwargs.get("fused_lm_head"):
        others = {name for name, value in kwargs.items() if name not in PACKED | KEPT and value is not None}
        if others or args or any(kwargs.get(name) is None for name in PACKED):
            raise ValueError(
                f"share_prompts packs batches of {', '.join(sorted(PACKED))} only, got {', '.join(sorted(kwargs))}; "
                "train without share_prompts"
            )
        batch = {name: kwargs[name] for name in PACKED}
        rows = pack_batch(**batch)
        device = batch["input_ids"].device
        kwargs = {name: value for name, value in kwargs.items() if name in KEPT}
        kwargs |= {**rows.inputs(device), "shift_labels": rows.labels.to(device)}
    packed = record_of(module).packed
    assert packed is not None, "share_prompts has set it"
    packed.append(rows)
    return args, kwargs


def _unpack(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Return the output with the values [B, S] of packed tokens as [N, L - 1], and the loss of the batch."""
    packed = record_of(module).packed
    rows = packed.pop() if packed else None  # there is none if the hook before the forward has raised
    if rows is None or output is None:
        return output
    values = {name: rows.gather(value) for name, value in output.items() if value.shape == rows.labels.shape}
    count = kwargs.get("num_items_in_batch")
    count = values["label_mask"].sum().clamp(min=1) if count is None else count
    return type(output)(**values, loss=-values["log_probs"].sum() / count)


def pack_batch(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> GroupedRows:
    """Return the rows of a padded batch [N, L], with an index [N, L - 1] as TRL shifts labels.

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
    return build_rows(rows, index, targets.tolist())
