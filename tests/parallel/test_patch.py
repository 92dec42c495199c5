"""`undo` reverts all patches of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from sightline.config import ParallelConfig, TrainingConfig
from sightline.models import build_skeleton, config_of
from sightline.models.decoder import Decoder
from sightline.parallel.compile import apply_compile
from sightline.parallel.context.apply import apply_context
from sightline.parallel.expert import apply_expert
from sightline.parallel.mesh import Mesh
from sightline.parallel.patch import replace_attribute, undo
from sightline.parallel.recompute import apply_recompute
from sightline.parallel.shard import apply_shard
from sightline.parallel.tensor import apply_tensor
from sightline.planning.torch_private import fake_process_group

CHANGES: dict[str, Callable[[Decoder, Mesh], None]] = {
    "tensor": apply_tensor,
    "expert": apply_expert,
    "context": apply_context,
    "recompute": lambda model, mesh: apply_recompute(model, TrainingConfig(recompute="selective")),
    "compile": lambda model, mesh: apply_compile(model, backend="eager"),
}


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    with fake_process_group(4, 0):
        yield Mesh(ParallelConfig(context=2, tensor=2, expert=2), torch.device("cpu"))


def skeleton() -> Decoder:
    """Return a model with dense layers, experts, auxiliary losses and two hidden state modules."""
    return build_skeleton(replace(config_of("deepseek_v3-debug"), mtp_loss_weight=0.3, aux_loss_coef=0.01))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return class, hooks, ids of the attributes and parameter names of every module."""
    result: dict[str, Any] = {}
    for name, module in model.named_modules():
        attributes = {key: value for key, value in vars(module).items() if key != "_parameters"}
        hooks = {key: dict(value) for key, value in attributes.items() if key.endswith("_hooks")}
        ids = {key: id(value) for key, value in attributes.items()}
        result[name] = type(module), hooks, ids, list(module._parameters)
    return result


@pytest.mark.parametrize("names", [*([name] for name in CHANGES), list(CHANGES)], ids=lambda names: ", ".join(names))
def test_undo_restores_every_module(names: list[str], mesh: Mesh) -> None:
    model = skeleton()
    before = snapshot(model)
    for name in names:
        CHANGES[name](model, mesh)
    assert snapshot(model) != before
    undo(model)
    assert snapshot(model) == before
    assert all("forward" not in vars(module) for module in model.modules())


def test_undo_of_an_attribute_that_was_replaced_twice() -> None:
    module = nn.Linear(2, 2)
    module.note = "original"
    for value in ("first", "second"):
        replace_attribute(module, "note", value)
        replace_attribute(module, "extra_repr", lambda: "replaced")
    assert module.note == "second" and repr(module) == "Linear(replaced)"
    undo(module)
    assert module.note == "original" and repr(module) == "Linear(in_features=2, out_features=2, bias=True)"


def test_undo_below_fsdp_is_an_error(mesh: Mesh) -> None:
    """FSDP subclasses the patched class: restoring the original class would remove its methods but not its hooks."""
    model = skeleton()
    apply_shard(model, mesh, dtype="float32")
    with pytest.raises(AssertionError, match="patches below FSDP cannot be reverted"):
        undo(model)
