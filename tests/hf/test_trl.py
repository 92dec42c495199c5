"""TRL's SFTTrainer and DPOTrainer: each document trains as if it were alone, with TRL's own batches and with ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, pack_dataset

from sightline.hf import PackedCollator, enable, is_enabled
from tests.support.hf import (
    SGD,
    Recorder,
    build_gpt_oss,
    build_llama,
    build_tokenizer,
    check_isolated,
    largest_difference,
    random_documents,
    train_alone,
)

BUILD = {"llama": build_llama, "gpt_oss": build_gpt_oss}
OPTIONS: dict[str, Any] = SGD | {
    "max_steps": 2,
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2,
    "bf16": False,
}


def examples_with_prompts() -> list[dict[str, Any]]:
    """Return documents whose first half has no loss, as the columns that TRL's preparation leaves alone."""
    documents = random_documents(24, seed=1)
    masks = [[int(i >= len(tokens) // 2) for i in range(len(tokens))] for tokens in documents]
    return [{"input_ids": tokens, "completion_mask": mask} for tokens, mask in zip(documents, masks, strict=True)]


def build_sft(model: Any, directory: Path, lora: LoraConfig | None = None, **options: Any) -> SFTTrainer:
    args = SFTConfig(output_dir=str(directory), completion_only_loss=True, **(OPTIONS | options))
    data = Dataset.from_list(examples_with_prompts())
    tokenizer = build_tokenizer()
    return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora)


def record(trainer: SFTTrainer) -> list[list[dict[str, Any]]]:
    """Return a list to which the trainer's collator appends the documents of each batch."""
    trainer.data_collator = Recorder(trainer.data_collator)
    return trainer.data_collator.batches


@pytest.mark.parametrize("collator", ["trl", "sightline"])
@pytest.mark.parametrize("packing", ["bfd", "padding_free"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_sft_equals_each_document_alone(family, packing, collator, tmp_path):
    model = BUILD[family]()
    reference = copy.deepcopy(model)
    bfd = {"packing": True, "packing_strategy": "bfd", "max_length": 24}
    options: dict[str, Any] = bfd if packing == "bfd" else {"padding_free": True, "max_length": None}
    trainer = build_sft(enable(model), tmp_path, **options)
    if collator == "sightline":
        trainer.data_collator = PackedCollator()
    batch = PackedCollator()([trainer.train_dataset[i] for i in range(3)])
    batches = record(trainer)
    trainer.train()
    assert packing != "bfd" or max(len(documents) for documents in batches) > 3
    losses = train_alone(reference, [batches[i] + batches[i + 1] for i in (0, 2)], lr=0.5)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.testing.assert_close(logged, losses, rtol=2e-5, atol=1e-4)  # transformers rounds what it logs
    assert largest_difference(model, reference) < 2e-6
    check_isolated(model, batch, 0.0 if family == "llama" else 1e-5)


def test_sft_of_rows_packed_before(tmp_path):
    """TRL refuses a collator of ours while it packs itself; it takes one for a dataset that is packed already."""
    model = build_llama()
    reference = copy.deepcopy(model)
    documents = Dataset.from_list([{"input_ids": tokens, "labels": tokens} for tokens in random_documents(24, seed=1)])
    args = SFTConfig(output_dir=str(tmp_path), dataset_kwargs={"skip_prepare_dataset": True}, **OPTIONS)
    rows = pack_dataset(documents, 24, "bfd")
    tokenizer, collator = build_tokenizer(), PackedCollator(max_length=24)
    trainer = SFTTrainer(enable(model), args, collator, train_dataset=rows, processing_class=tokenizer)
    batches = record(trainer)
    trainer.train()
    train_alone(reference, [batches[i] + batches[i + 1] for i in (0, 2)], lr=0.5)
    assert largest_difference(model, reference) < 2e-6


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_sft_by_name_alone(family, tmp_path):
    """A script that names the attention implementation, as on TRL's command line, trains as an enabled model does."""
    BUILD[family]().save_pretrained(tmp_path / "model")
    bfd = {"packing": True, "packing_strategy": "bfd", "max_length": 24}
    named = build_sft(str(tmp_path / "model"), tmp_path, model_init_kwargs={"attn_implementation": "sightline"}, **bfd)
    enabled = build_sft(enable(BUILD[family]()), tmp_path, **bfd)
    for trainer in (named, enabled):
        trainer.train()
    assert not is_enabled(named.model)
    assert largest_difference(named.model, enabled.model) < 1e-7


def test_sft_with_lora(tmp_path):
    """TRL adds the adapters to an enabled model."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    bfd = {"packing": True, "packing_strategy": "bfd", "max_length": 24}
    trainer = build_sft(enable(build_llama()), tmp_path, lora, **bfd)
    reference = get_peft_model(build_llama(), lora)
    reference.load_state_dict(trainer.model.state_dict())
    batches = record(trainer)
    trainer.train()
    train_alone(reference, [batches[i] + batches[i + 1] for i in (0, 2)], lr=0.5)
    assert largest_difference(trainer.model, reference) < 2e-6


def build_dpo(model: PreTrainedModel, ref_model: PreTrainedModel | None, directory: Path) -> DPOTrainer:
    def words(seed: int) -> list[str]:
        return [" ".join(map(str, tokens)) for tokens in random_documents(12, seed, shortest=4)]

    columns = {"prompt": words(1), "chosen": words(2), "rejected": words(3)}
    args = DPOConfig(output_dir=str(directory), max_length=None, **(OPTIONS | {"learning_rate": 0.05}))
    data, tokenizer = Dataset.from_dict(columns), build_tokenizer()
    return DPOTrainer(model=model, ref_model=ref_model, args=args, train_dataset=data, processing_class=tokenizer)


def check_rows(model: PreTrainedModel, batch: dict[str, Any]) -> None:
    """Change the padding and the first token of row 0: the logits of the tokens of all other rows stay."""
    tokens, real = batch["input_ids"], batch["attention_mask"].bool()
    changed = torch.where(real, tokens, tokens + 5)
    changed[0, 0] += 1
    with torch.no_grad():
        before, after = (model(ids, attention_mask=batch["attention_mask"]).logits for ids in (tokens, changed))
    assert not real.all()
    torch.testing.assert_close(after[1:][real[1:]], before[1:][real[1:]], rtol=0, atol=1e-5)
    assert bool((after[0][real[0]] != before[0][real[0]]).any(-1).all())


@pytest.mark.parametrize("reference_model", ["copy", "from_path", "adapter"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_dpo_equals_eager(family, reference_model, tmp_path):
    """TRL pads the pairs: chosen and rejected are rows of their own. The policy and the frozen model both run on us."""
    trained = []
    BUILD[family]().save_pretrained(tmp_path / "model")
    for implementation in ("eager", "sightline"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
        if implementation == "sightline":
            enable(model)
        frozen = copy.deepcopy(model) if reference_model == "copy" else None
        if reference_model == "adapter":
            torch.manual_seed(7)
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        trainer = build_dpo(model, frozen, tmp_path / implementation)
        if reference_model == "adapter":
            assert trainer.ref_model is None  # it is the model without the adapter
        else:
            assert trainer.ref_model.config._attn_implementation == implementation
        trainer.train()
        trained.append(model)
        assert trainer.ref_model is None or largest_difference(model, trainer.ref_model) > 1e-4
        check_rows(model, next(iter(trainer.get_train_dataloader())))
    assert largest_difference(*trained) < 2e-6
