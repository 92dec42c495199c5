"""TRL's trainers with the fused loss give the numbers that they give without it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from sightline.hf import trl_private
from sightline.hf.fused_loss import disable_fused_loss, enable_fused_loss
from sightline.hf.trl_private import replace_log_probs, restore_log_probs
from tests.support.hf_models import tiny_model

THEIRS = trl.trainer.utils._ChunkedLogProbFunction
MODEL = torch.nn.Linear(1, 1)
N, W, V = 50, 16, 41


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    trl_private._users.clear()  # models of other tests
    restore_log_probs(MODEL)
    yield
    restore_log_probs(MODEL)


def compute(softcap: float | None, scale: float, temperature: float, outputs: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the results of the function that TRL uses now, and the gradients of its operands."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias, factors = (
        torch.randn(*shape, generator=generator).requires_grad_() for shape in ((N, W), (V, W), (V,), (2, N))
    )
    labels = torch.randint(V, (N,), generator=generator)
    function = trl.trainer.utils._ChunkedLogProbFunction
    results = function.apply(hidden, weight, bias, labels, temperature, 1000, softcap, scale, outputs)
    total = (results[0] * factors[0].detach()).sum()
    if results[1] is not None:
        total = total + (results[1] * factors[1].detach()).sum()
    return results, torch.autograd.grad(total, (hidden, weight, bias))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (0.5, 0.7)])
@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy", "is_top1"), ("log_probs", "mean_logits")])
def test_log_probs_equal(softcap: float | None, scale: float, temperature: float, outputs: tuple[str, ...]) -> None:
    expected = compute(softcap, scale, temperature, outputs)
    replace_log_probs(MODEL)
    assert trl.trainer.utils._ChunkedLogProbFunction is not THEIRS
    torch.testing.assert_close(compute(softcap, scale, temperature, outputs), expected, rtol=1e-4, atol=1e-5)
    restore_log_probs(MODEL)
    assert trl.trainer.utils._ChunkedLogProbFunction is THEIRS


def test_disabling_one_of_two_models_keeps_the_function() -> None:
    models = tiny_model("llama"), tiny_model("llama")
    for model in models:
        enable_fused_loss(model)
    disable_fused_loss(models[0])
    assert trl.trainer.utils._ChunkedLogProbFunction is not THEIRS
    disable_fused_loss(models[1])
    assert trl.trainer.utils._ChunkedLogProbFunction is THEIRS


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="w0", bos_token="w1", eos_token="w2")


def words(seed: int, length: int) -> list[int]:
    return torch.randint(3, 100, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def sft(model: Any, directory: Path) -> SFTTrainer:
    rows = [{"input_ids": words(i, 20 + i), "completion_mask": [0] * 7 + [1] * (13 + i)} for i in range(8)]
    options = SFTConfig(**arguments(directory), packing=False, eval_strategy="steps", eval_steps=1)
    data = Dataset.from_list(rows)
    return SFTTrainer(model, options, train_dataset=data, eval_dataset=data, processing_class=tokenizer())


def dpo(model: Any, directory: Path) -> DPOTrainer:
    text = [{"prompt": f"w{i + 5} w7", "chosen": f"w{i + 9} w8 w9", "rejected": f"w{i + 4} w6"} for i in range(8)]
    options = DPOConfig(**arguments(directory))
    reference = tiny_model("gemma2", final_logit_softcapping=3.0)
    return DPOTrainer(model, reference, options, train_dataset=Dataset.from_list(text), processing_class=tokenizer())


def arguments(directory: Path) -> dict[str, Any]:
    return {
        **{"output_dir": str(directory), "max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1},
        **{"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "seed": 0, "bf16": False},
        **{"learning_rate": 1e-3, "gradient_accumulation_steps": 2, "gradient_checkpointing": False},
    }


@pytest.mark.parametrize("trainer", [sft, dpo])
def test_trainers_log_equal_numbers(trainer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    ours = trl_private._log_probs
    monkeypatch.setattr(trl_private, "_log_probs", lambda *args: calls.append(args[1].shape) or ours(*args))
    histories = []
    for enabled in (False, True):
        model = tiny_model("gemma2", final_logit_softcapping=3.0)
        if enabled:
            enable_fused_loss(model)
        run = trainer(model, tmp_path)
        run.train()
        histories.append([numbers(entry) for entry in run.state.log_history])
        assert bool(calls) == enabled
    for entry, expected in zip(*histories, strict=True):
        assert entry == pytest.approx(expected, rel=2e-4, abs=1e-6)
    assert "loss" in histories[1][0]
    disable_fused_loss(model)
    assert trl.trainer.utils._ChunkedLogProbFunction is THEIRS


def numbers(entry: dict[str, Any]) -> dict[str, float]:
    timings = ("runtime", "per_second", "flos")
    return {name: value for name, value in entry.items() if not any(word in name for word in timings)}


def test_other_devices_use_theirs() -> None:
    """TRL has a Triton kernel for them."""

    class Theirs(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return args[0].new_empty(3), None, None, None, None

    hidden, weight = torch.empty(3, 4, device="meta"), torch.empty(5, 4, device="meta")
    results = trl_private._log_probs(Theirs, hidden, weight, None, hidden[:, 0], 1.0, 1000, None, 1.0, ("log_probs",))
    assert results[0].is_meta
