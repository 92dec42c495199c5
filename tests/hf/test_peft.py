"""LoRA of PEFT on an enabled model, in either order, and on the models inside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from sightline.hf import PackedCollator, disable, enable
from tests.support.hf import (
    build_gpt_oss,
    build_llama,
    build_llama4,
    check_isolated,
    largest_difference,
    random_documents,
    train_alone,
)

BUILD = {"llama": build_llama, "gpt_oss": build_gpt_oss, "llama4": build_llama4}
DOCUMENTS = [{"input_ids": tokens} for tokens in random_documents(8)]


def add_lora(model: nn.Module) -> nn.Module:
    """Return the model with adapters whose product is not zero at the start."""
    torch.manual_seed(7)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


@pytest.mark.parametrize("order", ["enable first", "lora first"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "llama4"])
def test_lora_equals_each_document_alone(family, order, tmp_path):
    """Two steps of Trainer; then the model inside, the decoder inside, the merged model, and the saved adapter."""
    model, reference = BUILD[family](), add_lora(BUILD[family]())
    model = add_lora(enable(model)) if order == "enable first" else enable(add_lora(model))
    args: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.5, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    args |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    args |= {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 4, "max_steps": 2}
    data = Dataset.from_list(DOCUMENTS)
    Trainer(model, TrainingArguments(str(tmp_path), **args), data_collator=PackedCollator(), train_dataset=data).train()
    train_alone(reference, [DOCUMENTS[:4], DOCUMENTS[4:]], lr=0.5)
    assert largest_difference(model, reference) < 2e-6

    batch = PackedCollator()(DOCUMENTS[:4])
    tolerance = 1e-5 if family == "gpt_oss" else 0.0
    check_isolated(model, batch, tolerance)
    check_isolated(model.base_model.model, batch, tolerance)
    with model.disable_adapter():
        check_isolated(model, batch, tolerance)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    decoder = model.base_model.model.model
    with torch.no_grad():
        hidden = decoder(**inputs).last_hidden_state
        torch.testing.assert_close(model.get_output_embeddings()(hidden), model(**inputs).logits)
    model.save_pretrained(tmp_path / "adapter")
    texts = [path.read_text() for path in (tmp_path / "adapter").iterdir() if path.suffix in (".json", ".md")]
    assert texts and not any("sightline" in text for text in texts)
    check_isolated(model.merge_and_unload(), batch, tolerance)


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "llama4"])
def test_a_copy_is_enabled_by_itself(family):
    """A frozen copy, as for DPO, finds its own documents, also when the model runs in between."""
    model = enable(BUILD[family]())
    other = copy.deepcopy(model)
    batches = [PackedCollator()(DOCUMENTS[i : i + 4]) for i in (0, 4)]
    expected = [model(**batch).loss for batch in batches]
    first = other(**batches[0]).loss
    model(**batches[1])
    second = other(**batches[1]).loss
    (first + second).backward()
    assert [first.item(), second.item()] == [loss.item() for loss in expected]
    assert all(parameter.grad is None for parameter in model.parameters())
    check_isolated(other, batches[0], 1e-5 if family == "gpt_oss" else 0.0)
    assert disable(other).config._attn_implementation == "eager"
    assert not any(module._forward_pre_hooks for module in other.modules())
    assert model(**batches[0]).loss.item() == expected[0].item()  # only the copy is disabled


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused(config) -> None:
    model = get_peft_model(build_llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match=rf"{config.__name__} puts virtual tokens before each row.*use LoRA"):
        enable(model)
