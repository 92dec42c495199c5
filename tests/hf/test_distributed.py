"""DDP, FSDP2, accelerate and Trainer on two processes: the weights of one process and of each document alone."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments

from sightline.hf import PackedCollator, enable, is_enabled
from tests.support.hf import (
    SGD,
    build_gpt_oss,
    build_llama,
    build_llama4,
    check_isolated,
    random_documents,
    train_alone,
)
from tests.support.processes import run_on_ranks

DOCUMENTS = [{"input_ids": tokens} for tokens in random_documents(16, seed=3)]
STEPS = [DOCUMENTS[:8], DOCUMENTS[8:]]  # of both processes
BUILD = {"llama": build_llama, "gpt_oss": build_gpt_oss, "llama4": build_llama4}
LR = 0.5
ORDERS = ("enable first", "wrap first")
CASES = [f"{family}, {kind}, {order}" for family in BUILD for kind in ("ddp", "fsdp2") for order in ORDERS]
CASES += [f"llama4, {loop}, {kind}" for loop in ("accelerate", "trainer") for kind in ("ddp", "fsdp2")]


def shard(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any], backward: Any) -> None:
    """Take one step on the labels of all ranks; DDP and FSDP2 take the mean of gradients, so the loss is multiplied."""
    count = (batch["labels"] != -100).sum()
    dist.all_reduce(count)
    loss = model(**batch, num_items_in_batch=count).loss * dist.get_world_size()
    optimizer.zero_grad()
    backward(loss)
    optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    parameters = [parameter.detach() for parameter in model.parameters()]
    return [parameter.full_tensor() if isinstance(parameter, DTensor) else parameter for parameter in parameters]


def train_by_hand(rank: int, family: str, wrap: Any, enable_first: bool) -> list[Tensor]:
    model = BUILD[family]()
    model = wrap(enable(model)) if enable_first else enable(wrap(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for examples in STEPS:
        train_step(model, optimizer, PackedCollator()(examples[rank * 4 : rank * 4 + 4]), Tensor.backward)
    check_isolated(model, PackedCollator()(DOCUMENTS[:4]), 1e-5 if family == "gpt_oss" else 0.0)
    return weights(model)


class State(AcceleratorState):
    """State of accelerate that shards if there is a plugin: on a CPU, accelerate itself falls back to DDP."""

    def __init__(self, *args: Any, fsdp_plugin: FullyShardedDataParallelPlugin | None = None, **kwargs: Any) -> None:
        super().__init__(*args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


def check_wrapped(model: nn.Module, kind: str, batch: dict[str, Any]) -> None:
    assert is_enabled(model) and isinstance(model, {"ddp": DistributedDataParallel, "fsdp2": FSDPModule}[kind])
    assert all(isinstance(length, int) for row in batch["document_lengths"] for length in row)
    check_isolated(model, batch)


def train_with_accelerate(kind: str) -> list[Tensor]:
    wrap = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["Llama4TextDecoderLayer"]}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **wrap) if kind == "fsdp2" else None
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = enable(build_llama4())
    loader: Any = DataLoader(DOCUMENTS, batch_size=4, collate_fn=PackedCollator())  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=LR), loader)
    for batch in loader:
        train_step(model, optimizer, batch, accelerator.backward)
    check_wrapped(model, kind, batch)
    return weights(accelerator.unwrap_model(model))


def train_with_trainer(kind: str, directory: str) -> list[Tensor]:
    options = SGD | {
        "learning_rate": LR,
        "train_sampling_strategy": "sequential",
        "per_device_train_batch_size": 4,
        "max_steps": 2,
    }
    if kind == "fsdp2":
        config = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["Llama4TextDecoderLayer"]}
        options |= {"fsdp": "full_shard auto_wrap", "fsdp_config": config}
    model, args, data = enable(build_llama4()), TrainingArguments(directory, **options), Dataset.from_list(DOCUMENTS)
    trainer = Trainer(model, args, data_collator=PackedCollator(), train_dataset=data)
    trainer.train()
    check_wrapped(trainer.model_wrapped, kind, next(iter(trainer.get_train_dataloader())))
    return weights(trainer.model)


def train_everything(rank: int, directory: str) -> dict[str, list[Tensor]]:
    results = {}
    for family in BUILD:
        for name, wrap in (("ddp", DistributedDataParallel), ("fsdp2", shard)):
            for order in ORDERS:
                results[f"{family}, {name}, {order}"] = train_by_hand(rank, family, wrap, order == "enable first")
    for kind in ("ddp", "fsdp2"):
        with patch("accelerate.accelerator.AcceleratorState", State):
            results[f"llama4, accelerate, {kind}"] = train_with_accelerate(kind)
            AcceleratorState._reset_state(reset_partial_state=True)
            results[f"llama4, trainer, {kind}"] = train_with_trainer(kind, directory)
            AcceleratorState._reset_state(reset_partial_state=True)
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, list[Tensor]]:
    return run_on_ranks(2, train_everything, str(tmp_path_factory.mktemp("trainer")))[0]


@pytest.fixture(scope="module")
def alone() -> dict[str, list[Tensor]]:
    results = {}
    for family, build in BUILD.items():
        model = build()
        train_alone(model, STEPS, lr=LR)
        results[family] = weights(model)
    return results


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_each_document_alone(case, trained, alone):
    torch.testing.assert_close(trained[case], alone[case.split(",")[0]], rtol=0, atol=2e-6)
