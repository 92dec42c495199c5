"""Experts dealt out among processes: losses, gradients and balances are those of one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sightline import Batch
from sightline.batch import RowBuilder
from sightline.config import ParallelConfig, TrainingConfig
from sightline.layers import Router, routers_of
from sightline.models import build_skeleton, config_of, init_model_weights
from sightline.models.weight_init import fill_parameter
from sightline.parallel.context.apply import apply_context
from sightline.parallel.expert import apply_expert, sort_by_expert
from sightline.parallel.mesh import Mesh
from sightline.parallel.recompute import apply_recompute
from sightline.parallel.shard import apply_shard
from sightline.parallel.tensor import apply_tensor
from tests.support.processes import on_processes

CPU = torch.device("cpu")
FAMILIES = ["qwen3-debug-moe", "deepseek_v3-debug", "gpt_oss-debug", "llama4-debug", "qwen3_next-debug"]


def four_rows() -> Batch:
    """Four rows of 40 tokens, all of other documents; the last row is half padding."""
    generator = torch.Generator().manual_seed(1)
    lengths = [30, 10, 1, 25, 14, 40, 3, 17]
    return Batch.from_documents([torch.randint(512, (n,), generator=generator).tolist() for n in lengths], length=40)


def build(name: str, mesh: Mesh | None = None, **changes: Any) -> Any:
    """The same model on every mesh, its experts dealt out; no bias is 0."""
    model = build_skeleton(replace(config_of(name), **changes))
    if mesh is not None:
        apply_tensor(model, mesh)
        apply_expert(model, mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    init_model_weights(model)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            fill_parameter(parameter, lambda whole: whole.normal_(std=0.3))
    return model


def run(model: Any, batch: Batch) -> Tensor:
    loss = model(
        batch.tokens,
        attention_masks=model.get_attention_masks(batch),
        positions=batch.positions,
        labels=batch.labels,
    )
    loss.backward()
    return loss.detach()


def learn(model: Any, parts: list[Batch], mesh: Mesh | None = None) -> dict[str, Tensor]:
    """Loss, gradients and balances of a step over this process's parts of a batch, all summed over the processes."""
    sums = {"loss": torch.stack([run(model, part) for part in parts]).sum()}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            sums[name] = gradient.full_tensor()
        else:
            assert gradient is not None, name
            sums[name] = gradient if mesh is None else mesh.all_reduce(gradient, "loss")
    if mesh is not None:
        sums["loss"] = mesh.all_reduce(sums["loss"], "loss")
        sums |= model.finish_step(lambda total: mesh.all_reduce(total, "loss"))
    else:
        sums |= model.finish_step()
    sums |= {f"{name}.balance": r.balance for name, r in routers_of(model).items() if r.balance is not None}
    return sums


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each within 1e-5 of its norm."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0, f"{name} would be equal whatever happens"
        assert got[name].shape == value.shape, name
        off = float((got[name] - value).norm() / value.norm())
        assert off < 1e-5, f"{name} is off by {off:.1e} of its norm"


def step_of(
    rank: int, name: str, degrees: dict[str, int], batch: Batch, starved: bool = False, recompute: Any = "none"
) -> dict[str, Tensor]:
    """This process's part of a step."""
    mesh = Mesh(ParallelConfig(**degrees), CPU)
    model = build(name, mesh)
    apply_recompute(model, TrainingConfig(recompute=recompute))
    if starved:
        starve(model)
    if mesh.world > mesh.size("expert"):
        apply_shard(model, mesh, dtype="float32")
    return learn(model, [batch[split(4, mesh.size("data"))[mesh.index("data")]]], mesh)


def split(rows: int, processes: int) -> list[slice]:
    """The rows of each process."""
    size = rows // processes
    return [slice(first, first + size) for first in range(0, rows, size)]


def starve(model: Any) -> None:
    """No token chooses one of the first four experts."""
    for router in routers_of(model).values():
        router.expert_bias[:4] = -10.0


@pytest.mark.parametrize("name", FAMILIES)
def test_two_processes_compute_what_one_computes(name: str) -> None:
    rows = four_rows()
    expected = learn(build(name), [rows[:2], rows[2:]])
    for got in on_processes(2, step_of, name, {"expert": 2}, rows):
        assert_same(got, expected)


ON_FOUR = {
    "shared weights": {"shard": 4, "expert": 2},
    "shared and copied weights": {"replicate": 2, "shard": 2, "expert": 2},
    "tensor": {"shard": 2, "expert": 2, "tensor": 2},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "gpt_oss-debug" else pytest.mark.slow) for name in FAMILIES]
)
@pytest.mark.parametrize("mesh", ON_FOUR)
def test_four_processes_compute_what_one_computes(name: str, mesh: str) -> None:
    """gpt-oss has biases of every kind: those of `down` are added to a sum over `tensor`."""
    rows, degrees = four_rows(), ON_FOUR[mesh]
    expected = learn(build(name), [*map(rows.__getitem__, split(4, degrees.get("replicate", 1) * degrees["shard"]))])
    for got in on_processes(4, step_of, name, degrees, rows):
        assert_same(got, expected)


@pytest.mark.parametrize("how", ["full", "selective"])
def test_tokens_that_travel_again_when_recomputed(how: str) -> None:
    rows = four_rows()
    expected = learn(build("deepseek_v3-debug"), [rows[:2], rows[2:]])
    for got in on_processes(2, step_of, "deepseek_v3-debug", {"expert": 2}, rows, False, how):
        assert_same(got, expected)


def test_a_process_whose_experts_nobody_chooses() -> None:
    rows = four_rows()
    model = build("deepseek_v3-debug")
    starve(model)
    expected = learn(model, [rows[:2], rows[2:]])
    (gate,) = (value for name, value in expected.items() if name.endswith("experts.gate"))
    assert not gate[:4].any() and gate[4:].any()
    for got in on_processes(2, step_of, "deepseek_v3-debug", {"expert": 2}, rows, True):
        assert_same(got, expected)


def test_a_process_with_nothing_but_padding() -> None:
    rows = Batch.from_rows(
        [
            *zip(*(t.tolist() for t in vars(four_rows()[:2]).values() if isinstance(t, Tensor)), strict=True),
            *[RowBuilder(40).finish(0)] * 2,
        ]
    )
    expected = learn(build("qwen3-debug-moe"), [rows])
    for got in on_processes(2, step_of, "qwen3-debug-moe", {"expert": 2}, rows):
        assert_same(got, expected)


def refusals(rank: int) -> list[str]:
    mesh = Mesh(ParallelConfig(expert=4), CPU)
    told = []
    for name, changes in (("llama3-debug", {}), ("qwen3-debug", {}), ("qwen3-debug-moe", {"num_experts": 6})):
        with pytest.raises(ValueError) as refused:
            apply_expert(build_skeleton(replace(config_of(name), **changes)), mesh)
        told.append(str(refused.value))
    return told


def test_refusals_name_what_fits() -> None:
    (told, *others) = on_processes(4, refusals)
    assert told == [
        "parallel.expert 4: Llama3 has no experts with these sizes; use parallel.expert 1",
        "parallel.expert 4: Qwen3 has no experts with these sizes; use parallel.expert 1",
        "parallel.expert 4 does not divide the 6 experts of a layer of Qwen3; use parallel.expert 2",
    ]
    assert others == [told] * 3


def auxiliary_gradient(router: Router, x: Tensor, seeing: Tensor) -> Tensor:
    router(x, seeing)
    assert router.aux_loss is not None
    router.aux_loss.backward()
    assert router.weight.grad is not None
    return router.weight.grad


def router_and_tokens() -> tuple[Router, Tensor, Tensor]:
    """Tokens whose first half prefers other experts than the second, which has more padding."""
    torch.manual_seed(0)
    router = Router(8, 4, 2, aux_loss_coef=0.5).double()
    router.init_weights(std=1.0)
    x = torch.randn(24, 8, dtype=torch.float64)
    x[:12] += 2 * router.weight[0].detach()
    return router, x, torch.arange(24) < 17


def auxiliary_gradient_of_half(rank: int, shared: bool) -> Tensor:
    mesh = Mesh(ParallelConfig(context=2), CPU)
    router, x, seeing = router_and_tokens()
    if shared:
        apply_context(router, mesh)
    half = slice(12 * rank, 12 * rank + 12)
    return mesh.all_reduce(auxiliary_gradient(router, x[half], seeing[half]), "context")


def test_auxiliary_loss_of_rows_that_lie_on_two_processes() -> None:
    expected = auxiliary_gradient(*router_and_tokens())
    for got in on_processes(2, auxiliary_gradient_of_half, True):
        torch.testing.assert_close(got, expected)
    unlike, _ = on_processes(2, auxiliary_gradient_of_half, False)
    assert (unlike - expected).abs().max() > 0.1 * expected.abs().max(), "the halves would do by themselves"


def test_sorting_by_expert_by_hand() -> None:
    """Of process 0 two rows for expert 0 and one for expert 1, of process 1 one and two."""
    there, back = sort_by_expert(torch.tensor([[2, 1], [1, 2]]), 6)
    assert there.tolist() == [0, 1, 3, 2, 4, 5]
    assert back.tolist() == [0, 1, 3, 2, 4, 5]
    there, back = sort_by_expert(torch.tensor([[0, 2, 1], [1, 0, 0], [1, 1, 0]]), 6)
    assert there.tolist() == [3, 4, 0, 1, 5, 2]
    assert [there.tolist().index(i) for i in range(6)] == back.tolist()
    assert sort_by_expert(torch.zeros(2, 2, dtype=torch.int64), 0)[0].tolist() == []
