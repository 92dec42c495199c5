"""share_prompts(): let TRL's trainers compute each prompt once, whose batches repeat it in every row."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from sightline.hf.enable import enable, is_enabled
from sightline.hf.padded_batches import pack_batches

if TYPE_CHECKING:
    from transformers import Trainer

TRAINERS = {"GRPOTrainer", "RLOOTrainer", "DPOTrainer", "KTOTrainer"}


def share_prompts(trainer: Trainer) -> None:
    """Let a trainer of TRL (GRPO, RLOO, DPO, KTO) compute each prompt once, in its model and its reference model.

    Call it once before `trainer.train()`. It enables the models. Losses, gradients and metrics stay those of the padded
    batch. Only sequences of one batch on one process share prompts: GRPO shuffles the responses of the batches that it
    generates at a time, so keep `steps_per_generation=1` and let `per_device_train_batch_size` be a multiple of
    `num_generations`. `sightline.hf.disable(model)` reverts it.

    Raises:
        ValueError: if it is another trainer, or a version of TRL that computes log-probabilities in another way.
    """
    cls = next((cls for cls in type(trainer).__mro__ if cls.__name__ in TRAINERS), None)
    if cls is None:
        raise ValueError(f"share_prompts is for TRL's {', '.join(sorted(TRAINERS))}, got a {type(trainer).__name__}")
    if not hasattr(sys.modules[cls.__module__], "add_fused_lm_head"):
        raise ValueError(
            f"share_prompts: {cls.__name__} of this version of TRL computes log-probabilities in another way; use TRL "
            "1.16"
        )
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            if not is_enabled(model):
                enable(model)
            pack_batches(model)
