"""Activation recomputation gives the same results with less activation memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sightline import Batch
from sightline.config import TrainingConfig
from sightline.layers import routers_of
from sightline.models import build_model, config_of
from sightline.parallel.recompute import apply_recompute

MODELS: dict[str, Any] = {
    name: config_of(name)
    for name in ("llama3-debug", "llama4-debug", "qwen3-debug-moe", "qwen3_next-debug", "gpt_oss-debug", "vlm-debug")
} | {"deepseek_v3-debug": replace(config_of("deepseek_v3-debug"), mtp_loss_weight=0.3, aux_loss_coef=0.01)}


def two_rows(name: str) -> Batch:
    """Return documents of many lengths; for the VLM, with one image of 4 x 4 patches per row."""
    generator = torch.Generator().manual_seed(1)
    lengths = [30, 10, 1, 25, 14]
    batch = Batch.from_documents([torch.randint(511, (n,), generator=generator).tolist() for n in lengths], length=48)
    if name == "vlm-debug":
        batch.tokens[:, 3:7] = MODELS[name].image_token_id
        patches = torch.randn(2, 16, MODELS[name].vision.patch_channels, generator=generator)
        batch.extra.update(patches=patches, patch_grid=torch.tensor([[[4, 4]]] * 2))
    return batch


def build(config: Any, training: TrainingConfig) -> Any:
    torch.manual_seed(0)
    model = build_model(config)
    apply_recompute(model, training)
    return model


def forward(model: Any, batch: Batch) -> Tensor:
    return model(
        batch.tokens,
        attention_masks=model.get_attention_masks(batch),
        positions=batch.positions,
        labels=batch.labels,
        **batch.extra,
    )


def learn(name: str, training: TrainingConfig) -> dict[str, Tensor]:
    """Return losses, gradients and the routers' counts of a step of two forwards."""
    model, batch = build(MODELS[name], training), two_rows(name)
    results = {}
    for number in range(2):
        loss = forward(model, batch)
        loss.backward()
        results[f"loss {number}"] = loss.detach()
    results |= {parameter_name: p.grad for parameter_name, p in model.named_parameters() if p.grad is not None}
    results |= {f"{layer} counts": r.counts for layer, r in routers_of(model).items() if r.counts is not None}
    return results | model.finish_step()


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("name", MODELS)
def test_recompute_changes_no_results(name: str, recompute: Literal["full", "selective"]) -> None:
    """Parameter names, gradients and router counts stay the same: the recomputed forward must not count again."""
    expected = learn(name, TrainingConfig())
    actual = learn(name, TrainingConfig(recompute=recompute))
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-6, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


class SavedMemory(TorchDispatchMode):
    """Counts the bytes of all storages allocated under it and still alive, except those of the weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = {StorageWeakRef(parameter.untyped_storage()) for parameter in model.parameters()}
        self.sizes: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def bytes(self) -> int:
        allocated = self.sizes.keys() - self.weights
        return sum(self.sizes[storage] for storage in allocated if not storage.expired())


def saved_floats_per_layer(training: TrainingConfig) -> float:
    """Return the floats per token that a layer of llama3-debug saves: half the difference of 4 and 2 layers."""
    saved = []
    for layers in (2, 4):
        model = build(replace(config_of("llama3-debug"), num_layers=layers), training)
        batch = Batch.from_documents([list(range(2, 130))], length=128)
        inputs = {"positions": batch.positions, "labels": batch.labels}
        with SavedMemory(model) as memory:
            loss = model(batch.tokens, attention_masks=model.get_attention_masks(batch), **inputs)
        saved.append(memory.bytes())
        loss.backward()
    return (saved[1] - saved[0]) / 2 / 4 / 128


def test_saved_floats_per_layer() -> None:
    """Hidden size 64, 4 query and 2 key heads of size 16, intermediate size 128."""
    everything = saved_floats_per_layer(TrainingConfig())
    selective = saved_floats_per_layer(TrainingConfig(recompute="selective"))
    full = saved_floats_per_layer(TrainingConfig(recompute="full"))
    half = saved_floats_per_layer(TrainingConfig(recompute="full", recompute_every=2))
    assert full == 64, "its input"
    products = 64 + 32 + 32 + 64 + 128 + 128 + 64  # query, key, value, output, gate, up, down
    assert selective == 64 + products + 64 + 4, "the input, and attention's output and log-sum-exp per head"
    assert half == (full + everything) / 2
    assert everything > 1.5 * selective
