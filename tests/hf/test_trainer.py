"""transformers' Trainer with PackedCollator: each document trains as if it were alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from sightline.hf import PackedCollator, enable
from tests.support.hf import (
    SGD,
    Recorder,
    build_gpt_oss,
    build_llama,
    check_isolated,
    largest_difference,
    random_documents,
    sum_of_losses,
    train_alone,
)

BUILD = {"llama": build_llama, "gpt_oss": build_gpt_oss}
DOCUMENTS = [{"input_ids": tokens} for tokens in random_documents(24)]


def build_trainer(model: Any, directory: Path, collator: Any = None, **options: Any) -> Trainer:
    defaults: dict[str, Any] = SGD | {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    args = TrainingArguments(output_dir=str(directory), **(defaults | options))
    data = Dataset.from_list(DOCUMENTS)
    return Trainer(model, args, data_collator=collator or PackedCollator(), train_dataset=data, eval_dataset=data)


def logged(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("max_length", [None, 24])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_training_equals_each_document_alone(family, max_length, tmp_path):
    """Three steps of two batches: losses and weights; then the evaluation and a change of tokens in a batch."""
    model = BUILD[family]()
    reference = copy.deepcopy(model)
    collator = Recorder(PackedCollator(max_length=max_length))
    trainer = build_trainer(enable(model), tmp_path, collator)
    trainer.train()
    batches = collator.batches[:6]
    assert [len(examples) for examples in batches] == [4] * 6
    losses = train_alone(reference, [batches[i] + batches[i + 1] for i in (0, 2, 4)], lr=0.5)
    torch.testing.assert_close(logged(trainer), losses, rtol=2e-5, atol=1e-4)  # transformers rounds what it logs
    assert largest_difference(model, reference) < 2e-6

    with torch.no_grad():  # Trainer takes the mean of the mean loss of each batch
        alone = [sum_of_losses(reference, DOCUMENTS[i : i + 4]) for i in range(0, len(DOCUMENTS), 4)]
    expected = sum(float(total) / count for total, count in alone) / len(alone)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)
    check_isolated(model, next(iter(trainer.get_train_dataloader())), 0.0 if family == "llama" else 1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_the_name_alone_trains_the_same(family, tmp_path):
    """A model that is not enabled takes the collator's batch too: position_ids and cu_seq_lens reach its layers."""
    models = [BUILD[family](), BUILD[family]()]
    models[0].set_attn_implementation("sightline")
    enable(models[1])
    for model in models:
        build_trainer(model, tmp_path).train()
    assert largest_difference(*models) == 0.0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_gradient_checkpointing_is_equal_to_the_bit(family, reentrant, tmp_path):
    models = [enable(BUILD[family]()), enable(BUILD[family]())]
    build_trainer(models[0], tmp_path, max_steps=1).train()
    kwargs = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    build_trainer(models[1], tmp_path, max_steps=1, **kwargs).train()
    assert largest_difference(*models) == 0.0


def test_resume_from_a_checkpoint(tmp_path):
    """Two steps, then a new process' trainer for the third: the weights of three steps, and no trace of us on disk."""
    models = [build_llama() for _ in range(3)]
    build_trainer(enable(models[0]), tmp_path / "whole").train()
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    build_trainer(enable(models[1]), tmp_path / "parts", max_steps=2, **options).train()
    build_trainer(enable(models[2]), tmp_path / "parts", **options).train(resume_from_checkpoint=True)
    assert largest_difference(models[0], models[2]) == 0.0

    checkpoint = tmp_path / "parts" / "checkpoint-2"
    assert not [path for path in checkpoint.rglob("*.json") if "sightline" in path.read_text()]
    reloaded = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert reloaded.config._attn_implementation == "sdpa"
    assert largest_difference(models[1], reloaded) == 0.0


def test_a_batch_dealt_by_accelerate_is_refused(tmp_path):
    """For a stream, accelerate slices each tensor of a batch by rows, cu_seq_lens too, unless it is told not to."""
    stream = Dataset.from_list(DOCUMENTS).to_iterable_dataset()
    trainer = build_trainer(enable(build_llama()), tmp_path, max_steps=1)
    trainer.train_dataset = stream
    with pytest.raises(ValueError, match="dispatch_batches"):
        trainer.train()
    model, reference = build_llama(), build_llama()
    collator = Recorder(PackedCollator())
    trainer = build_trainer(
        enable(model), tmp_path, collator, max_steps=1, accelerator_config={"dispatch_batches": False}
    )
    trainer.train_dataset = stream
    trainer.train()
    train_alone(reference, [collator.batches[0] + collator.batches[1]], lr=0.5)
    assert largest_difference(model, reference) < 2e-6
