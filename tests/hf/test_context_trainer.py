"""ContextParallelTrainer on 2 ranks (one group) and 4 (two groups) trains like transformers' Trainer on one process."""

import tempfile
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch.distributed.fsdp import fully_shard
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from sightline.hf import context_parallel, enable
from sightline.hf.context_trainer import ContextParallelTrainer
from tests.hf.test_context import BATCH, COUNT
from tests.support.hf_models import tiny_model
from tests.support.processes import run_on_ranks

FAMILIES = ["llama", "gpt_oss"]
GENERATOR = torch.Generator().manual_seed(0)
DATA = Dataset.from_list(
    [
        {"input_ids": torch.randint(4, 120, (int(n),), generator=GENERATOR).tolist()}
        for n in torch.randint(2, 30, (24,), generator=GENERATOR)
    ]
)


def build(cls: type[Trainer], name: str, directory: str, data_ranks: int, **more: Any) -> Trainer:
    """Return a trainer whose steps have 2 batches of 4 documents."""
    args: dict[str, Any] = {
        "output_dir": directory,
        "max_steps": 3,
        "per_device_train_batch_size": 4 // data_ranks,
        "per_device_eval_batch_size": 4 // data_ranks,
        "gradient_accumulation_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "use_cpu": True,
    } | more.pop("args", {})
    model = more.pop("model", None) or enable(tiny_model(name))
    return cls(
        model,
        TrainingArguments(**args),
        data_collator=DataCollatorWithFlattening(),
        train_dataset=DATA,
        eval_dataset=DATA,
        **more,
    )


def train(cls: type[Trainer], name: str, data_ranks: int = 1, **more: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        trainer = build(cls, name, directory, data_ranks, **more)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {
            "losses": [entry["loss"] for entry in log],
            "norms": [float(entry["grad_norm"]) for entry in log],
            "weights": [p.detach().clone() for p in trainer.model.parameters()],
            "eval": trainer.evaluate()["eval_loss"],
            "short": trainer.evaluate(DATA.select(range(22)))["eval_loss"],  # the last batch has 2 documents
            "epochs": trainer.state.epoch,
            "flops": trainer.state.total_flos,
        }


def message(**more: Any) -> str:
    with tempfile.TemporaryDirectory() as directory:
        try:
            build(ContextParallelTrainer, "llama", directory, 1, **more).train()
        except ValueError as error:
            return str(error)
    return "nothing was refused"


REFUSALS: dict[str, tuple[str, dict[str, Any]]] = {
    "size": ("must be at least 2 and divide the number of processes, got 3 and 2", {"context_parallel_size": 3}),
    "smoothing": ("label_smoothing_factor would receive", {"args": {"label_smoothing_factor": 0.1}}),
    "loss function": ("compute_loss_func would receive", {"compute_loss_func": lambda *args, **kwargs: None}),
    "metrics": ("compute_metrics would receive", {"compute_metrics": lambda prediction: {}}),
    "token count": ("include_num_input_tokens_seen would", {"args": {"include_num_input_tokens_seen": "all"}}),
}


def train_fully_sharded() -> float:
    """Return the largest gradient difference between FSDP2, scaled as in the documentation, and full rows."""
    whole = enable(tiny_model("llama"))
    whole(**BATCH, num_items_in_batch=COUNT, use_cache=False).loss.backward()
    model = enable(tiny_model("llama"))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    with context_parallel(model, dist.group.WORLD, BATCH) as local:
        loss = model(**local).loss
    (loss * dist.get_world_size()).backward()
    pairs = zip(model.parameters(), whole.parameters(), strict=True)
    return max(float((p.grad.full_tensor() - q.grad).abs().max() / q.grad.abs().max()) for p, q in pairs)


def all_figures(rank: int, data_ranks: int) -> dict[str, Any]:
    figures: dict[str, Any] = {
        name: train(ContextParallelTrainer, name, data_ranks, context_parallel_size=2) for name in FAMILIES
    }
    if data_ranks == 1:
        figures["refusals"] = {
            name: message(**{"context_parallel_size": 2} | case) for name, (_, case) in REFUSALS.items()
        }
        figures["fully sharded"] = train_fully_sharded()
        local_mean = {"average_tokens_across_devices": False}
        figures["local mean"] = train(ContextParallelTrainer, "llama", args=local_mean, context_parallel_size=2)
    return figures


@cache
def figures_of(data_ranks: int) -> list[dict[str, Any]]:
    return run_on_ranks(2 * data_ranks, all_figures, data_ranks)


@cache
def reference(name: str) -> dict[str, Any]:
    return train(Trainer, name)


def check(found: dict[str, Any], name: str) -> None:
    expected = reference(name)
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=0, atol=1.1e-4)  # rounded for the log
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-5, atol=0)
    assert all((a - b).abs().max() < 2e-6 for a, b in zip(found["weights"], expected["weights"], strict=True))
    assert found["epochs"] == expected["epochs"]
    assert found["flops"] == pytest.approx(expected["flops"])


@pytest.mark.parametrize("data_ranks", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_training_equals_one_process(name: str, data_ranks: int) -> None:
    for figures in figures_of(data_ranks):
        check(figures[name], name)


@pytest.mark.parametrize("name", FAMILIES)
def test_evaluation_equals_one_process(name: str) -> None:
    expected = reference(name)
    for figures in (*figures_of(1), *figures_of(2)):
        assert figures[name]["eval"] == pytest.approx(expected["eval"], rel=1e-5)
    for figures in figures_of(1):
        assert figures[name]["short"] == pytest.approx(expected["short"], rel=1e-5)


def test_mean_over_the_labels_of_each_rank_equals_one_process() -> None:
    for figures in figures_of(1):
        check(figures["local mean"], "llama")


def test_gradients_of_fsdp2_add_up() -> None:
    assert all(figures["fully sharded"] < 5e-6 for figures in figures_of(1))


@pytest.mark.parametrize("name", REFUSALS)
def test_what_needs_all_tokens_of_a_row_is_refused(name: str) -> None:
    for figures in figures_of(1):
        assert REFUSALS[name][0] in figures["refusals"][name]
