"""share_prompts: TRL's GRPO, RLOO, DPO and KTO trainers compute the same with each prompt once."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

from sightline.hf import disable, share_prompts
from tests.support.hf import SGD, build_tokenizer
from tests.support.hf_models import tiny_model

OPTIONS: dict[str, Any] = SGD | {"max_steps": 2, "learning_rate": 0.01, "bf16": False, "gradient_checkpointing": False}
FAMILIES = ["llama", "gpt_oss", "gemma2", "olmo3", "deepseek_v3"]


def words(count: int, seed: int, shortest: int = 18, longest: int = 26) -> list[str]:
    draw = random.Random(seed)
    lengths = [draw.randint(shortest, longest) for _ in range(count)]
    return [" ".join(str(draw.randrange(4, 97)) for _ in range(length)) for length in lengths]


def reward(completions: list[str], **_: Any) -> list[float]:
    return [sum(map(int, filter(str.isdigit, text.split()))) % 7 for text in completions]


def saved_model(directory: Path) -> PreTrainedModel:
    """Return a model that the trainer can load a second time, as its reference model."""
    tiny_model("llama").save_pretrained(directory / "model")
    return AutoModelForCausalLM.from_pretrained(directory / "model", attn_implementation="sdpa")


def build_grpo(model: PreTrainedModel, directory: Path, kind: str = "grpo", **options: Any) -> GRPOTrainer:
    sizes = {"num_generations": 4, "max_completion_length": 9, "per_device_train_batch_size": 8, "temperature": 0.8}
    trainer, config = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}[kind]
    peft_config = options.pop("peft_config", None)
    return trainer(
        model=model,
        reward_funcs=reward,
        args=config(output_dir=str(directory), **(OPTIONS | sizes | options)),
        train_dataset=Dataset.from_dict({"prompt": words(8, seed=1)}),
        processing_class=build_tokenizer(),
        peft_config=peft_config,
    )


def build_dpo(model: PreTrainedModel, directory: Path) -> DPOTrainer:
    columns = {"prompt": words(8, 1), "chosen": words(8, 2, 1, 9), "rejected": words(8, 3, 1, 9)}
    args = DPOConfig(output_dir=str(directory), per_device_train_batch_size=4, **OPTIONS)
    frozen = copy.deepcopy(model)
    return DPOTrainer(model, frozen, args, train_dataset=Dataset.from_dict(columns), processing_class=build_tokenizer())


def build_kto(model: PreTrainedModel, directory: Path) -> KTOTrainer:
    columns = {"prompt": words(4, 1) * 2, "completion": words(8, 2, 1, 9), "label": [True, False] * 4}
    args = KTOConfig(output_dir=str(directory), per_device_train_batch_size=8, **OPTIONS)
    frozen = copy.deepcopy(model)
    return KTOTrainer(model, frozen, args, train_dataset=Dataset.from_dict(columns), processing_class=build_tokenizer())


def padded_groups() -> dict[str, Tensor]:
    """Return a batch as GRPO pads it: prompts padded left, responses padded right, one of them empty."""
    draw = random.Random(5)
    prompts = [[draw.randrange(4, 100) for _ in range(length)] for length in (30, 22)]
    input_ids, attention_mask = torch.zeros(7, 42, dtype=torch.int64), torch.zeros(7, 42, dtype=torch.int64)
    for row, (number, length) in enumerate([(0, 5), (1, 12), (0, 1), (0, 0), (1, 7), (1, 12), (0, 12)]):
        prompt, end = prompts[number], 30 + length
        input_ids[row, 30 - len(prompt) : 30] = torch.tensor(prompt)
        input_ids[row, 30:end] = torch.tensor([draw.randrange(4, 100) for _ in range(length)])
        attention_mask[row, 30 - len(prompt) : end] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 12}


def score(trainer: GRPOTrainer, model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities and entropies [7, 12] by TRL's method, and the gradients of a loss of both."""
    model.zero_grad()
    batch = padded_groups()
    log_probs, entropies, _ = trainer._get_per_token_logps_and_entropies(model, **batch, compute_entropy=True)
    real = batch["attention_mask"][:, -12:]
    log_probs, entropies = log_probs * real, entropies * real
    factors = torch.linspace(-1, 2, log_probs.numel()).view(log_probs.shape)
    ((log_probs * factors).sum() + entropies.sum() / 7).backward()
    return log_probs, entropies, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def count_tokens(model: PreTrainedModel) -> list[int]:
    """Return a list to which each forward of the decoder appends its number of tokens."""
    counts: list[int] = []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda module, args, output: counts.append(args[0].numel()))
    return counts


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_of_grpo_equal_those_of_padded_batches(family, tmp_path):
    model = tiny_model(family)
    trainer = build_grpo(model, tmp_path)
    expected = score(trainer, model)
    share_prompts(trainer)
    counts = count_tokens(model)
    results = score(trainer, model)
    assert counts == [29 + (6 + 2 + 1 + 13) + 21 + (13 + 8 + 13)]
    torch.testing.assert_close(results[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[1], expected[1], rtol=1e-5, atol=1e-5)
    assert (results[2] - expected[2]).abs().max() < 4e-5 * expected[2].abs().max()
    disable(model)
    assert all(torch.equal(a, b) for a, b in zip(score(trainer, model), expected, strict=True))


def train(trainer: Trainer, shared: bool) -> tuple[list[dict[str, float]], Tensor]:
    """Return the logged values of each step, and the change of the parameters."""
    if shared:
        share_prompts(trainer)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    start = parameters_to_vector(parameters).detach().clone()
    torch.manual_seed(0)
    trainer.train()
    times = ("time", "second", "runtime", "total_flos", "memory")
    logs = [{k: v for k, v in entry.items() if not any(t in k for t in times)} for entry in trainer.state.log_history]
    return logs[:-1], parameters_to_vector(parameters).detach() - start


def check_equal(runs: list[tuple[list[dict[str, float]], Tensor]]) -> None:
    (expected_logs, expected), (logs, change) = runs
    assert len(logs) == 2
    for got, want in zip(logs, expected_logs, strict=True):
        assert got == pytest.approx(want, rel=2e-5, abs=5e-6)
    assert (change - expected).norm() < 5e-5 * expected.norm()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("grpo", {"beta": 0.1}),
        ("grpo", {"num_iterations": 2, "loss_type": "grpo", "mask_truncated_completions": True}),
        ("grpo", {"gradient_accumulation_steps": 2, "steps_per_generation": 1, "top_entropy_quantile": 0.5}),
        ("grpo", {"gradient_checkpointing": True}),
        ("rloo", {"beta": 0.1}),
    ],
)
def test_steps_equal_those_of_padded_batches(kind, options, tmp_path):
    runs, most_tokens = [], []
    for shared in (False, True):
        trainer = build_grpo(saved_model(tmp_path), tmp_path, kind, **options)
        counts = count_tokens(trainer.model)
        runs.append(train(trainer, shared))
        most_tokens.append(max(counts))
    check_equal(runs)
    assert most_tokens[1] < 0.75 * most_tokens[0]


def test_steps_with_lora_equal_those_of_padded_batches(tmp_path):
    runs = []
    for shared in (False, True):
        torch.manual_seed(1)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        runs.append(train(build_grpo(tiny_model("llama"), tmp_path, peft_config=lora, beta=0.1), shared))
    check_equal(runs)


@pytest.mark.parametrize(("build", "family"), [(build_dpo, "llama"), (build_dpo, "gpt_oss"), (build_kto, "llama")])
def test_steps_on_preferences_equal_those_of_padded_batches(build, family, tmp_path):
    """The loss of gpt-oss has the auxiliary loss of its router."""
    check_equal([train(build(tiny_model(family), tmp_path), shared) for shared in (False, True)])


def test_pairs_of_dpo_equal_the_concatenated_forward(tmp_path):
    model = tiny_model("llama")
    trainer = build_dpo(model, tmp_path)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # the reference model is another
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    expected = trainer._compute_loss(model, inputs, return_outputs=False)
    expected.backward()
    expected_gradient = model.lm_head.weight.grad.clone()
    share_prompts(trainer)
    counts = count_tokens(model)
    model.zero_grad()
    loss = trainer._compute_loss(model, inputs, return_outputs=False)
    loss.backward()
    assert loss.item() != pytest.approx(math.log(2), abs=1e-3)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    assert (model.lm_head.weight.grad - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
    assert counts[0] < 0.6 * inputs["input_ids"].numel()


def test_auxiliary_loss_of_the_router_counts_each_token_of_the_batch(tmp_path):
    """The weights of packed tokens are how often the batch has them; TRL asks for this loss by default."""
    model = tiny_model("mixtral")
    trainer = build_grpo(model, tmp_path)
    assert trainer.aux_loss_enabled
    values, gradients = [], []
    for shared in (False, True):
        if shared:
            share_prompts(trainer)
        model.zero_grad()
        *_, aux_loss = trainer._get_per_token_logps_and_entropies(model, **padded_groups(), compute_aux_loss=True)
        aux_loss.backward()
        values.append(aux_loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*values, rtol=0, atol=1e-6)
    assert (gradients[0] - gradients[1]).abs().max() < 4e-5 * gradients[0].abs().max()


def test_other_trainers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is for TRL's DPOTrainer, .* got a Trainer"):
        share_prompts(Trainer(tiny_model("llama"), TrainingArguments(str(tmp_path), use_cpu=True)))


def test_other_versions_of_trl_are_refused(tmp_path, monkeypatch):
    trainer = build_grpo(tiny_model("llama"), tmp_path)
    monkeypatch.delattr("trl.trainer.grpo_trainer.add_fused_lm_head")
    with pytest.raises(ValueError, match="GRPOTrainer of this version of TRL computes log-prob"):
        share_prompts(trainer)


def test_calls_that_cannot_be_packed_are_refused(tmp_path):
    model = tiny_model("llama")
    share_prompts(build_grpo(model, tmp_path))
    batch = {"input_ids": torch.tensor([[4, 5, 6]]), "attention_mask": torch.ones(1, 3), "fused_lm_head": True}
    with pytest.raises(ValueError, match=r"packs batches of .* got .*token_type_ids"):
        model(**batch, labels=batch["input_ids"], token_type_ids=batch["input_ids"])
    with pytest.raises(ValueError, match="labels that are the tokens themselves"):
        model(**batch, labels=batch["input_ids"] + 1)
    assert model(**batch, labels=batch["input_ids"]).log_probs.shape == (1, 2)  # a refusal leaves nothing behind
