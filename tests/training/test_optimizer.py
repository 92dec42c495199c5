"""Weight decay, optimizer state, and Muon compared with torch.optim.Muon."""

import dataclasses
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sightline.config import OPTIMIZER_STATE, OptimizerConfig
from sightline.layers import Experts
from sightline.layers.base import Role, parameter_info
from sightline.models import build_model
from sightline.training.optimizer import OPTIMIZERS, build_optimizer, optimizer_state
from sightline.training.optimizer.muon import orthogonalize
from tests.support.small_runs import MODEL

FAMILIES = (
    *("llama3-debug", "llama4-debug", "qwen3-debug", "qwen3-debug-moe", "deepseek_v3-debug", "gpt_oss-debug"),
    *("qwen3_next-debug", "vlm-debug"),
)


def test_matrices_decay_and_vectors_do_not() -> None:
    model = build_model(MODEL)
    matrices, vectors = build_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    assert matrices["fused"] and vectors["fused"]
    grouped = [id(p) for group in (matrices, vectors) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_a_tied_weight_is_in_one_group_once() -> None:
    model = build_model(dataclasses.replace(MODEL, tied_embeddings=True))
    optimizer = build_optimizer(model, OptimizerConfig())
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == sum(
        p.numel() for p in model.parameters()
    )


def test_initial_optimizer_state_equals_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Linear(3, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    options = OptimizerConfig(learning_rate=0.1)
    mine = build_optimizer(ours, options)
    plain = torch.optim.AdamW(
        [{"params": [theirs.weight]}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=0.1, betas=options.betas, eps=options.eps, weight_decay=options.weight_decay, fused=True,
    )  # fmt: skip
    for _ in range(3):
        for model, optimizer in ((ours, mine), (theirs, plain)):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
    assert set(optimizer_state(ours, mine)["weight"]) == set(plain.state[theirs.weight])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_without_gradients_a_step_changes_only_parameters_with_decay(name: str, optimizer: Any) -> None:
    """tests/layers/test_base.py lists the parameters without decay."""
    model = build_model(name)
    for p in model.parameters():
        nn.init.ones_(p)  # weight decay changes only values other than 0
        p.grad = torch.zeros_like(p)
    build_optimizer(model, OptimizerConfig(name=optimizer, weight_decay=0.5, learning_rate=0.1)).step()
    for key, p, role in parameter_info(model):
        assert torch.equal(p, torch.full_like(p, 0.95 if role.decays else 1.0)), key


def test_config_lists_every_optimizer_and_its_state() -> None:
    assert get_args(get_type_hints(OptimizerConfig)["name"]) == tuple(OPTIMIZERS) == tuple(OPTIMIZER_STATE)
    model = build_model("gpt_oss-debug")
    for name, (of_matrix, of_other) in OPTIMIZER_STATE.items():
        state = optimizer_state(model, build_optimizer(model, OptimizerConfig(name=name)))  # type: ignore[arg-type]
        for key, p, role in parameter_info(model):
            numbers = sum(value.numel() for value in state[key].values() if value.ndim)
            assert numbers == p.numel() * (of_matrix if role is Role.MATRIX else of_other), (name, key)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_with_non_finite_gradients_changes_nothing(name: Any) -> None:
    torch.manual_seed(0)
    model = build_model(MODEL)
    optimizer = build_optimizer(model, OptimizerConfig(name=name, learning_rate=0.1))

    def step(gradient: float, found: float) -> dict[str, torch.Tensor]:
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        optimizer.found_inf = torch.tensor(found)
        optimizer.step()
        state = {
            f"{key}/{part}": value.clone()
            for key, parts in optimizer_state(model, optimizer).items()
            for part, value in parts.items()
        }
        return {**state, **{key: p.detach().clone() for key, p in model.named_parameters()}}

    before = step(0.1, 0.0)
    for gradient in (float("nan"), float("inf"), 0.2):
        after = step(gradient, 1.0)
        assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not any(torch.equal(value, after[key]) for key, value in step(0.2, 0.0).items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_reads_nothing_from_the_device(name: Any) -> None:
    """Uses fake tensors, which raise an error if a value is read."""
    with FakeTensorMode():
        model = nn.ModuleList([Experts(4, 8, 16, bias=True), nn.Linear(16, 8), nn.Embedding(9, 8)])
        optimizer = build_optimizer(model, OptimizerConfig(name=name))
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.found_inf = torch.zeros(())
        with pytest.raises(DataDependentOutputException):
            optimizer.found_inf.item()
        optimizer.step()


def test_orthogonalize_equals_the_iteration_of_torch() -> None:
    """From weights of 0, a step of torch.optim.Muon is its iteration in bfloat16. Stacked matrices are independent."""
    torch.manual_seed(0)
    for shape in ((64, 32), (32, 64), (48, 48), (1, 16)):
        weight, gradient = nn.Parameter(torch.zeros(shape)), torch.randn(shape)
        weight.grad = gradient.clone()
        torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
        theirs = -weight.detach() / max(1, shape[0] / shape[1]) ** 0.5
        assert torch.allclose(orthogonalize(gradient.bfloat16()).float(), theirs, atol=0.01)
        assert torch.allclose(orthogonalize(gradient), theirs, atol=0.02)
        assert torch.allclose(orthogonalize(gradient), by_singular_values(gradient), atol=1e-5)
        stacked = orthogonalize(torch.stack([gradient, 100 * gradient, torch.zeros(shape)]))
        assert torch.allclose(stacked[0], orthogonalize(gradient), atol=1e-6)
        assert torch.allclose(stacked[1], stacked[0], atol=1e-5) and not stacked[2].any()
    assert orthogonalize(torch.zeros(0, 3, 2)).shape == (0, 3, 2)  # a rank without experts


def by_singular_values(x: torch.Tensor) -> torch.Tensor:
    """Apply Jordan's polynomial five times to each singular value, in float64."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s @ v).to(x.dtype)


def test_muon_equals_torch_muon_and_adamw() -> None:
    """Reference: torch.optim.Muon for the matrices, torch.optim.AdamW for the other parameters."""
    torch.manual_seed(0)
    ours = build_model(MODEL)
    theirs = build_model(MODEL)
    theirs.load_state_dict(ours.state_dict())
    options = OptimizerConfig(name="muon", learning_rate=0.02, weight_decay=0.3, momentum=0.9)
    mine = build_optimizer(ours, options)
    by_role = {role: [p for _, p, r in parameter_info(theirs) if r is role] for role in Role}
    muon = torch.optim.Muon(
        by_role[Role.MATRIX], lr=0.02, weight_decay=0.3, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [{"params": by_role[Role.VOCABULARY]}, {"params": by_role[Role.OTHER], "weight_decay": 0.0}],
        lr=0.02, betas=options.betas, eps=options.eps, weight_decay=0.3, fused=True,
    )  # fmt: skip
    for _ in range(3):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for optimizer in (mine, muon, adamw):
            optimizer.step()
    for (key, a, role), b in zip(parameter_info(ours), theirs.parameters(), strict=True):
        if role is Role.MATRIX:  # torch's iteration rounds to bfloat16
            assert torch.allclose(a, b, atol=0.02 * 0.2 * max(a.shape) ** 0.5 * 0.03), key
            momentum = mine.state[a]["momentum_buffer"]
            assert torch.equal(momentum, muon.state[b]["momentum_buffer"]), key
        else:
            assert torch.equal(a, b), key


def test_each_expert_is_a_separate_matrix() -> None:
    torch.manual_seed(0)
    model = build_model("gpt_oss-debug")
    gate = model.layers["0"].moe.experts.gate
    before = gate.detach().clone()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    build_optimizer(model, OptimizerConfig(name="muon", learning_rate=0.1, weight_decay=0.0)).step()
    for expert, (old, new) in enumerate(zip(before, gate.detach(), strict=True)):
        assert torch.allclose(old - new, 0.1 * 0.2 * 8 * orthogonalize(gate.grad[expert]), atol=1e-6)  # 8 = 64^0.5
