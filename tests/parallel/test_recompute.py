"""What is computed again equals what was kept, and takes less memory."""

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
    """Documents of many lengths; where the model sees, one image of 4 x 4 patches a row."""
    generator = torch.Generator().manual_seed(1)
    lengths = [30, 10, 1, 25, 14]
    batch = Batch.from_documents([torch.randint(511, (n,), generator=generator).tolist() for n in lengths], length=48)
    if name == "vlm-debug":
        batch.tokens[:, 3:7] = MODELS[name].image_token
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
    """Loss, gradients and what the routers have counted in a step of two forwards."""
    model, batch = build(MODELS[name], training), two_rows(name)
    told = {}
    for number in range(2):
        loss = forward(model, batch)
        loss.backward()
        told[f"loss {number}"] = loss.detach()
    told |= {parameter_name: p.grad for parameter_name, p in model.named_parameters() if p.grad is not None}
    told |= {f"{layer} counts": r.counts for layer, r in routers_of(model).items() if r.counts is not None}
    return told | model.finish_step()


@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("name", MODELS)
def test_everything_is_as_without(name: str, how: Literal["full", "selective"]) -> None:
    """Names of parameters, gradients, and the routers' counts, which a second forward might add to."""
    expected = learn(name, TrainingConfig())
    got = learn(name, TrainingConfig(recompute=how))
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-6, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


class Kept(TorchDispatchMode):
    """Counts the bytes of all memory that is made under it and still held; views of weights are no memory."""

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
        made = self.sizes.keys() - self.weights
        return sum(self.sizes[storage] for storage in made if not storage.expired())


def floats_a_layer_keeps(training: TrainingConfig) -> float:
    """Of each token, in Llama 3's debug size: from models of 2 and of 4 layers, so that the ends do not count."""
    kept = []
    for layers in (2, 4):
        model = build(replace(config_of("llama3-debug"), num_layers=layers), training)
        batch = Batch.from_documents([list(range(2, 130))], length=128)
        inputs = {"positions": batch.positions, "labels": batch.labels}
        with Kept(model) as memory:
            loss = model(batch.tokens, attention_masks=model.get_attention_masks(batch), **inputs)
        kept.append(memory.bytes())
        loss.backward()
    return (kept[1] - kept[0]) / 2 / 4 / 128


def test_what_a_layer_keeps() -> None:
    """Width 64, 4 query and 2 key heads of 16, inner width 128."""
    everything = floats_a_layer_keeps(TrainingConfig())
    selective = floats_a_layer_keeps(TrainingConfig(recompute="selective"))
    full = floats_a_layer_keeps(TrainingConfig(recompute="full"))
    half = floats_a_layer_keeps(TrainingConfig(recompute="full", recompute_every=2))
    assert full == 64, "its input"
    products = 64 + 32 + 32 + 64 + 128 + 128 + 64  # query, key, value, output, gate, up, down
    assert selective == 64 + products + 64 + 4, "and the results of attention: its output and a log-sum-exp a head"
    assert half == (full + everything) / 2
    assert everything > 1.5 * selective
