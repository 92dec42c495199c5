"""Forward and loss of a model never read device data on the host.

Meta tensors have no data, so reading one raises. Masks and labels are on the CPU, as in a training step.
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


def run_with_equal_counts(x: Tensor, counts: Tensor, *layers: Any, run: Callable[..., Any]) -> Any:
    """Run the grouped matrix products with equal counts, which need not be read from the device."""
    equal_counts = torch.full(counts.shape, len(x) // len(counts), dtype=torch.int64)
    return run(x, equal_counts, *layers)


ALLOWED = {
    "token counts of experts, without a grouped kernel": (grouped, "_by_group", run_with_equal_counts),
}
"""Known device reads without expert parallelism, each with a replacement that does not read. Expert parallelism has one
more: the number of tokens that each rank sends (`sightline.parallel.expert.dispatch`)."""


def batch_of(config: Any) -> Batch:
    return pack_images(config) if hasattr(config, "image_token_id") else pack(LENGTHS, config.vocab_size)


@pytest.mark.parametrize("labels_on", ["cpu", "meta"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_loss_do_not_read_the_device(family: str, labels_on: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_skeleton(config_of(f"{family}-debug"), attention_backend="sdpa").train()
    inputs = prepare_batch(model, batch_of(model.config), None, "meta")
    assert all(mask.device.type == "cpu" for mask in inputs["attention_masks"].values())
    inputs["labels"] = inputs["labels"].to(labels_on)
    for module, name, replacement in ALLOWED.values():
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, run=run, new=replacement: new(*args, run=run))
    loss = model(**inputs)
    assert loss.device.type == "meta" and loss.shape == ()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_reading_a_meta_tensor_raises() -> None:
    with ExitStack() as stack, pytest.raises((RuntimeError, NotImplementedError)):
        stack.enter_context(torch.device("meta"))
        torch.ones(3).sum().item()
