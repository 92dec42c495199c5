"""Expert parallelism: losses, gradients and expert biases equal those of one process."""

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
from sightline.parallel.expert import apply_expert, check_expert, sort_by_expert
from sightline.parallel.mesh import Degrees, Mesh
from sightline.parallel.recompute import apply_recompute
from sightline.parallel.shard import apply_shard
from sightline.parallel.tensor import apply_tensor
from tests.support.processes import run_on_ranks

CPU = torch.device("cpu")
FAMILIES = ["qwen3-debug-moe", "deepseek_v3-debug", "gpt_oss-debug", "llama4-debug", "qwen3_next-debug"]


def four_rows() -> Batch:
    """Return four rows of 40 tokens with different documents; the last row is half padding."""
    generator = torch.Generator().manual_seed(1)
    lengths = [30, 10, 1, 25, 14, 40, 3, 17]
    return Batch.from_documents([torch.randint(512, (n,), generator=generator).tolist() for n in lengths], length=40)


def build(name: str, mesh: Mesh | None = None, **changes: Any) -> Any:
    """Return the same model on every mesh, with sharded experts and nonzero biases."""
    model = build_skeleton(replace(config_of(name), **changes))
    if mesh is not None:
        apply_tensor(model, mesh)
        apply_expert(model, mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    init_model_weights(model)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            fill_parameter(parameter, lambda full: full.normal_(std=0.3))
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
    """Return loss, gradients and expert biases of a step over this rank's parts of a batch, summed over the ranks."""
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
    biases = {f"{name}.expert_bias": router.expert_bias for name, router in routers_of(model).items()}
    sums |= {name: bias for name, bias in biases.items() if bias is not None}
    return sums


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check that each tensor differs by at most 1e-5 of its norm."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.norm() > 0, f"{name} is zero, so the comparison would always pass"
        assert actual[name].shape == value.shape, name
        error = float((actual[name] - value).norm() / value.norm())
        assert error < 1e-5, f"{name} differs by {error:.1e} of its norm"


def step_of(
    rank: int, name: str, degrees: dict[str, int], batch: Batch, unused: bool = False, recompute: Any = "none"
) -> dict[str, Tensor]:
    """Return the results of a step on this rank's rows."""
    mesh = Mesh(ParallelConfig(**degrees), CPU)
    model = build(name, mesh)
    apply_recompute(model, TrainingConfig(recompute=recompute))
    if unused:
        avoid_first_experts(model)
    if mesh.world > mesh.size("expert"):
        apply_shard(model, mesh, dtype="float32")
    return learn(model, [batch[split(4, mesh.size("data"))[mesh.index("data")]]], mesh)


def split(rows: int, ranks: int) -> list[slice]:
    """Return the rows of each rank."""
    size = rows // ranks
    return [slice(first, first + size) for first in range(0, rows, size)]


def avoid_first_experts(model: Any) -> None:
    """Set expert biases so that no token selects one of the first four experts."""
    for router in routers_of(model).values():
        router.expert_bias[:4] = -10.0


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_equal_one(name: str) -> None:
    rows = four_rows()
    expected = learn(build(name), [rows[:2], rows[2:]])
    for actual in run_on_ranks(2, step_of, name, {"expert": 2}, rows):
        assert_close(actual, expected)


ON_FOUR = {
    "FSDP": {"shard": 4, "expert": 2},
    "HSDP": {"replicate": 2, "shard": 2, "expert": 2},
    "tensor": {"shard": 2, "expert": 2, "tensor": 2},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "gpt_oss-debug" else pytest.mark.slow) for name in FAMILIES]
)
@pytest.mark.parametrize("mesh", ON_FOUR)
def test_four_ranks_equal_one(name: str, mesh: str) -> None:
    """gpt-oss has all kinds of biases: those of `down` are added to a partial sum over `tensor`."""
    rows, degrees = four_rows(), ON_FOUR[mesh]
    expected = learn(build(name), [*map(rows.__getitem__, split(4, degrees.get("replicate", 1) * degrees["shard"]))])
    for actual in run_on_ranks(4, step_of, name, degrees, rows):
        assert_close(actual, expected)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputed_exchange_equals_one_process(recompute: str) -> None:
    rows = four_rows()
    expected = learn(build("deepseek_v3-debug"), [rows[:2], rows[2:]])
    for actual in run_on_ranks(2, step_of, "deepseek_v3-debug", {"expert": 2}, rows, False, recompute):
        assert_close(actual, expected)


def test_rank_whose_experts_receive_no_tokens() -> None:
    rows = four_rows()
    model = build("deepseek_v3-debug")
    avoid_first_experts(model)
    expected = learn(model, [rows[:2], rows[2:]])
    (gate,) = (value for name, value in expected.items() if name.endswith("experts.gate"))
    assert not gate[:4].any() and gate[4:].any()
    for actual in run_on_ranks(2, step_of, "deepseek_v3-debug", {"expert": 2}, rows, True):
        assert_close(actual, expected)


def test_rank_with_only_padding() -> None:
    rows = Batch.from_rows(
        [
            *zip(*(t.tolist() for t in vars(four_rows()[:2]).values() if isinstance(t, Tensor)), strict=True),
            *[RowBuilder(40).finish(0)] * 2,
        ]
    )
    expected = learn(build("qwen3-debug-moe"), [rows])
    for actual in run_on_ranks(2, step_of, "qwen3-debug-moe", {"expert": 2}, rows):
        assert_close(actual, expected)


def test_errors_name_valid_degrees() -> None:
    degrees = Degrees(ParallelConfig(expert=4), 4)
    errors = []
    for name, changes in (("llama3-debug", {}), ("qwen3-debug", {}), ("qwen3-debug-moe", {"num_experts": 6})):
        with pytest.raises(ValueError) as error:
            check_expert(build_skeleton(replace(config_of(name), **changes)), degrees)
        errors.append(str(error.value))
    assert errors == [
        "parallel.expert 4: Llama3 has no experts with these sizes; use parallel.expert 1",
        "parallel.expert 4: Qwen3 has no experts with these sizes; use parallel.expert 1",
        "parallel.expert 4 does not divide the 6 experts of a layer of Qwen3; use parallel.expert 2",
    ]


def aux_loss_gradient(router: Router, x: Tensor, visible: Tensor) -> Tensor:
    router(x, visible)
    assert router.aux_loss is not None
    router.aux_loss.backward()
    assert router.weight.grad is not None
    return router.weight.grad


def router_and_tokens() -> tuple[Router, Tensor, Tensor]:
    """Return a router, tokens and a padding mask; the halves prefer different experts, the second has more padding."""
    torch.manual_seed(0)
    router = Router(8, 4, 2, aux_loss_coef=0.5).double()
    router.init_weights(std=1.0)
    x = torch.randn(24, 8, dtype=torch.float64)
    x[:12] += 2 * router.weight[0].detach()
    return router, x, torch.arange(24) < 17


def aux_loss_gradient_of_half(rank: int, sync_counts: bool) -> Tensor:
    mesh = Mesh(ParallelConfig(context=2), CPU)
    router, x, visible = router_and_tokens()
    if sync_counts:
        apply_context(router, mesh)
    half = slice(12 * rank, 12 * rank + 12)
    return mesh.all_reduce(aux_loss_gradient(router, x[half], visible[half]), "context")


def test_aux_loss_of_rows_sharded_by_context_parallelism() -> None:
    expected = aux_loss_gradient(*router_and_tokens())
    for actual in run_on_ranks(2, aux_loss_gradient_of_half, True):
        torch.testing.assert_close(actual, expected)
    unsynced, _ = run_on_ranks(2, aux_loss_gradient_of_half, False)
    assert (unsynced - expected).abs().max() > 0.1 * expected.abs().max(), "too small to test"


def test_sort_by_expert_by_hand() -> None:
    """First case: rank 0 sends 2 tokens to expert 0 and 1 to expert 1, rank 1 sends 1 and 2."""
    order, inverse = sort_by_expert(torch.tensor([[2, 1], [1, 2]]), 6)
    assert order.tolist() == [0, 1, 3, 2, 4, 5]
    assert inverse.tolist() == [0, 1, 3, 2, 4, 5]
    order, inverse = sort_by_expert(torch.tensor([[0, 2, 1], [1, 0, 0], [1, 1, 0]]), 6)
    assert order.tolist() == [3, 4, 0, 1, 5, 2]
    assert [order.tolist().index(i) for i in range(6)] == inverse.tolist()
    assert sort_by_expert(torch.zeros(2, 2, dtype=torch.int64), 0)[0].tolist() == []
