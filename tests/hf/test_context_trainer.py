"""ContextParallelTrainer and a loop of one's own, on 2 ranks (one group) and 4 (two groups), train like one process."""

import tempfile
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from sightline.hf import PackedCollator, context_parallel, enable
from sightline.hf.context_trainer import ContextParallelTrainer
from tests.hf.test_distributed import State
from tests.support.hf import SGD, build_tokenizer
from tests.support.hf_models import tiny_model
from tests.support.processes import run_on_ranks

FAMILIES = ["llama", "gpt_oss"]
LR = 0.05
GENERATOR = torch.Generator().manual_seed(0)
DATA = Dataset.from_list(
    [
        {"input_ids": torch.randint(4, 97, (int(n),), generator=GENERATOR).tolist()}
        for n in torch.randint(2, 30, (24,), generator=GENERATOR)
    ]
)


class PackedSFTTrainer(ContextParallelTrainer, SFTTrainer):
    """TRL's trainer with context parallelism."""


def build(cls: type[Trainer], name: str, directory: str, data_ranks: int, **more: Any) -> Trainer:
    """Return a trainer whose steps have 2 batches of 4 documents."""
    args: dict[str, Any] = (
        SGD
        | {
            "output_dir": directory,
            "max_steps": 3,
            "per_device_train_batch_size": 4 // data_ranks,
            "per_device_eval_batch_size": 4 // data_ranks,
            "gradient_accumulation_steps": 2,
            "learning_rate": LR,
            "max_grad_norm": 0.5,
        }
        | more.pop("args", {})
    )
    config: type[TrainingArguments] = TrainingArguments
    if issubclass(cls, SFTTrainer):
        config, more = SFTConfig, more | {"processing_class": build_tokenizer()}
        args |= {"bf16": False, "gradient_checkpointing": False, "max_length": None}
    model = enable(tiny_model(name))
    return cls(model, config(**args), data_collator=PackedCollator(), train_dataset=DATA, eval_dataset=DATA, **more)


def weights(model: nn.Module) -> list[Tensor]:
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def train(cls: type[Trainer], name: str, data_ranks: int = 1, **more: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        trainer = build(cls, name, directory, data_ranks, **more)
        trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        return {
            "losses": [entry["loss"] for entry in log],
            "norms": [float(entry["grad_norm"]) for entry in log],
            "accuracies": [entry.get("mean_token_accuracy") for entry in log],
            "weights": weights(trainer.model),
            "eval": trainer.evaluate()["eval_loss"],
            "short": trainer.evaluate(DATA.select(range(22)))["eval_loss"],  # the last batch has 2 documents
            "epochs": trainer.state.epoch,
            "flops": trainer.state.total_flos,
        }


def train_fully_sharded(data_ranks: int) -> dict[str, Any]:
    config = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    options = {"fsdp": "full_shard auto_wrap", "fsdp_config": config}
    AcceleratorState._reset_state(reset_partial_state=True)
    with patch("accelerate.accelerator.AcceleratorState", State):
        return train(ContextParallelTrainer, "llama", data_ranks, args=options, context_parallel_size=2)


def train_in_a_loop(ranks_of_a_row: int) -> list[Tensor]:
    """Train as documented: 3 steps of 8 documents."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    model = enable(tiny_model("llama"))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=LR))
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks // ranks_of_a_row, ranks_of_a_row), mesh_dim_names=("data", "context"))
    data, context = mesh["data"], mesh["context"]
    sampler = DistributedSampler(DATA, data.size(), data.get_local_rank(), shuffle=False)
    loader = DataLoader(DATA, batch_size=8 // data.size(), sampler=sampler, collate_fn=PackedCollator())
    for batch in loader:
        count = (batch["labels"] != -100).sum()
        dist.all_reduce(count, group=data.get_group())
        batch["num_items_in_batch"] = count
        with context_parallel(model, context.get_group(), batch) as local:
            loss = model(**local).loss
        accelerator.backward(loss * ranks)
        optimizer.step()
        optimizer.zero_grad()
    return weights(accelerator.unwrap_model(model))


def train_alone_in_a_loop() -> list[Tensor]:
    model = enable(tiny_model("llama"))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for start in range(0, len(DATA), 8):
        batch = PackedCollator()([DATA[i] for i in range(start, start + 8)])
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    return weights(model)


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


def all_figures(rank: int, data_ranks: int) -> dict[str, Any]:
    figures: dict[str, Any] = {
        name: train(ContextParallelTrainer, name, data_ranks, context_parallel_size=2) for name in FAMILIES
    }
    if data_ranks == 1:
        figures["refusals"] = {
            name: message(**{"context_parallel_size": 2} | case) for name, (_, case) in REFUSALS.items()
        }
        figures["trl"] = train(PackedSFTTrainer, "llama", context_parallel_size=2)
        local_mean = {"average_tokens_across_devices": False}
        figures["local mean"] = train(ContextParallelTrainer, "llama", args=local_mean, context_parallel_size=2)
    figures["loop"] = train_in_a_loop(2)
    figures["fully sharded"] = train_fully_sharded(data_ranks)
    return figures


@cache
def figures_of(data_ranks: int) -> list[dict[str, Any]]:
    return run_on_ranks(2 * data_ranks, all_figures, data_ranks)


@cache
def reference(name: str, cls: type[Trainer] = Trainer) -> dict[str, Any]:
    return train(cls, name)


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(found["losses"], expected["losses"], rtol=0, atol=1.1e-4)  # rounded for the log
    torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-5, atol=0)
    assert all((a - b).abs().max() < 2e-6 for a, b in zip(found["weights"], expected["weights"], strict=True))
    assert found["epochs"] == expected["epochs"]
    assert found["flops"] == pytest.approx(expected["flops"])


@pytest.mark.parametrize("data_ranks", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_training_equals_one_process(name: str, data_ranks: int) -> None:
    for figures in figures_of(data_ranks):
        check(figures[name], reference(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_evaluation_equals_one_process(name: str) -> None:
    expected = reference(name)
    for figures in (*figures_of(1), *figures_of(2)):
        assert figures[name]["eval"] == pytest.approx(expected["eval"], rel=1e-5)
    for figures in figures_of(1):
        assert figures[name]["short"] == pytest.approx(expected["short"], rel=1e-5)


def test_mean_over_the_labels_of_each_rank_equals_one_process() -> None:
    for figures in figures_of(1):
        check(figures["local mean"], reference("llama"))


@pytest.mark.parametrize("data_ranks", [1, 2])
def test_fsdp2_equals_one_process(data_ranks: int) -> None:
    for figures in figures_of(data_ranks):
        check(figures["fully sharded"], reference("llama"))


@pytest.mark.parametrize("data_ranks", [1, 2])
def test_the_documented_loop_equals_one_process(data_ranks: int) -> None:
    for figures in figures_of(data_ranks):
        assert all((a - b).abs().max() < 2e-6 for a, b in zip(figures["loop"], train_alone_in_a_loop(), strict=True))


def test_the_trainer_of_trl_equals_one_process() -> None:
    expected = reference("llama", SFTTrainer)
    for figures in figures_of(1):
        check(figures["trl"], expected)
        assert figures["trl"]["accuracies"] == pytest.approx(expected["accuracies"])


@pytest.mark.parametrize("name", REFUSALS)
def test_what_needs_all_tokens_of_a_row_is_refused(name: str) -> None:
    for figures in figures_of(1):
        assert REFUSALS[name][0] in figures["refusals"][name]
