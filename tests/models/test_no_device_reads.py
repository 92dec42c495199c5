"""Nothing inside a model's forward and loss reads from the device.

Meta tensors hold no data, so any read of one raises. Masks and labels lie on the CPU, as a training step gives them.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor

from sightline.batch import Batch
from sightline.layers import grouped
from sightline.models import build_skeleton, config_of
from sightline.training.step import prepare_batch
from tests.parallel.context.rows import LENGTHS, pack, pack_images

FAMILIES = ("llama3", "llama4", "qwen3", "qwen3_next", "deepseek_v3", "gpt_oss", "vlm")


def even(x: Tensor, counts: Tensor, *layers: Any, run: Callable[..., Any]) -> Any:
    """The grouped products with counts that nobody has to read."""
    share = torch.full(counts.shape, len(x) // len(counts), dtype=torch.int64)
    return run(x, share, *layers)


ALLOWED = {
    "token counts of experts, where no grouped kernel serves": (grouped, "_by_group", even),
}
"""The reads that stay on one process, each replaced here by one that does not read. Under expert parallelism one more
stays: how many rows each process sends (`sightline.parallel.expert.dispatch`)."""


def batch_of(config: Any) -> Batch:
    return pack_images(config) if hasattr(config, "image_token") else pack(LENGTHS, config.vocab_size)


@pytest.mark.parametrize("labels_on", ["cpu", "meta"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_loss_read_nothing(family: str, labels_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_skeleton(config_of(f"{family}-debug"), attention_backend="sdpa").train()
    inputs = prepare_batch(model, batch_of(model.config), None, "meta")
    assert all(mask.device.type == "cpu" for mask in inputs["attention_masks"].values())
    inputs["labels"] = inputs["labels"].to(labels_on)
    for module, name, instead in ALLOWED.values():
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, run=run, instead=instead: instead(*args, run=run))
    loss = model(**inputs)
    assert loss.device.type == "meta" and loss.shape == ()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_read_would_raise() -> None:
    with ExitStack() as stack, pytest.raises((RuntimeError, NotImplementedError)):
        stack.enter_context(torch.device("meta"))
        torch.ones(3).sum().item()
