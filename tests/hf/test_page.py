"""The Python of docs/huggingface.md about shared prompts and context parallelism runs as it is written.

tests/hf/test_recipes.py runs the recipes, which load a model and a dataset.
"""

from __future__ import annotations

import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import Trainer, TrainingArguments
from trl import GRPOTrainer

import sightline.hf
from sightline.hf import PackedCollator, enable
from tests.hf.test_context_trainer import DATA, LR, weights
from tests.hf.test_groups import alone, dialogues
from tests.hf.test_share_prompts import build_grpo, count_tokens
from tests.support.hf import SGD
from tests.support.hf_models import tiny_model
from tests.support.processes import run_on_ranks

PAGE = (Path(__file__).parents[2] / "docs" / "huggingface.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
RECIPES = 3
"""Blocks that tests/hf/test_recipes.py runs."""
SHARE, GROUPS, CONTEXT, TRAINER, LOOP = range(RECIPES, RECIPES + 5)


def run_block(index: int, **variables: Any) -> dict[str, Any]:
    """Run a block with these variables, on a CPU, and return all its variables."""
    exec(compile(BLOCKS[index].replace('"cuda"', '"cpu"'), f"block {index}", "exec"), variables)
    return variables


def test_every_block_is_run() -> None:
    assert len(BLOCKS) == LOOP + 1
    assert all("from_pretrained" in block for block in BLOCKS[:RECIPES])


def test_share_prompts(tmp_path: Path) -> None:
    counts = []

    def build(*_: Any) -> GRPOTrainer:
        trainer = build_grpo(tiny_model("llama"), tmp_path, max_steps=1)
        counts.append(count_tokens(trainer.model))
        return trainer

    trainer = run_block(SHARE, sightline=sightline, GRPOTrainer=build)["trainer"]
    assert trainer.state.global_step == 1
    build().train()
    assert max(counts[0]) < 0.75 * max(counts[1])


def test_groups() -> None:
    prompts, responses = dialogues()
    expected = alone(tiny_model("llama"), prompts, responses)
    found = run_block(
        GROUPS, sightline=sightline, model=enable(tiny_model("llama")), prompts=prompts, responses=responses
    )
    torch.testing.assert_close(found["log_probs"], expected[0], rtol=0, atol=5e-5)
    torch.testing.assert_close(found["entropies"], expected[1], rtol=0, atol=5e-5)


def batches() -> list[dict[str, Any]]:
    """Return the batches of the loop on the page, of 8 documents in the order of its sampler."""
    sampler = DistributedSampler(DATA, 1, 0)
    return list(DataLoader(DATA, 8, sampler=sampler, collate_fn=PackedCollator()))


def arguments(directory: str, documents: int) -> TrainingArguments:
    return TrainingArguments(directory, **SGD | {"max_steps": 1, "per_device_train_batch_size": documents})


def run_context(rank: int) -> dict[str, Any]:
    """Run the three blocks about context parallelism on one group of ranks."""
    model, group, batch = enable(tiny_model("llama")), dist.group.WORLD, batches()[0]
    batch["num_items_in_batch"] = (batch["labels"] != -100).sum()
    loss = run_block(CONTEXT, sightline=sightline, model=model, group=group, batch=batch)["loss"].detach()
    dist.all_reduce(loss)
    modules = {"dist": dist, "sightline": sightline, "init_device_mesh": init_device_mesh}
    modules |= {"DataLoader": DataLoader, "DistributedSampler": DistributedSampler}
    model = DistributedDataParallel(enable(tiny_model("llama")))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    run_block(LOOP, **modules, model=model, optimizer=optimizer, documents=DATA)
    with tempfile.TemporaryDirectory() as directory:
        variables = {"args": arguments(directory, 8), "data": DATA, "model": tiny_model("llama")}
        trainer = run_block(TRAINER, sightline=sightline, **variables)["trainer"]
        trainer.train()
    return {"loss": float(loss), "loop": weights(model), "trainer": trainer.state.log_history[0]["loss"]}


@cache
def context_figures() -> list[dict[str, Any]]:
    return run_on_ranks(2, run_context)


def test_context_parallel() -> None:
    model, batch = enable(tiny_model("llama")), batches()[0]
    for figures in context_figures():
        assert abs(figures["loss"] - float(model(**batch).loss.detach())) < 2e-6


def test_loop_with_context_parallelism() -> None:
    model = enable(tiny_model("llama"))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for batch in batches():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for figures in context_figures():
        assert all((a - b).abs().max() < 2e-6 for a, b in zip(figures["loop"], weights(model), strict=True))


def test_trainer_with_context_parallelism(tmp_path: Path) -> None:
    trainer = Trainer(
        enable(tiny_model("llama")), arguments(str(tmp_path), 8), data_collator=PackedCollator(), train_dataset=DATA
    )
    trainer.train()
    for figures in context_figures():
        assert abs(figures["trainer"] - trainer.state.log_history[0]["loss"]) < 1.1e-4
