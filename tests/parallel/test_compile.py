"""Compiled layers equal eager layers, and new documents cause no recompilation."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from sightline import Batch
from sightline.config import ParallelConfig, TrainingConfig
from sightline.generation import SamplingConfig, generate
from sightline.models import build_model, build_skeleton, init_model_weights
from sightline.parallel.compile import apply_compile
from sightline.parallel.expert import apply_expert
from sightline.parallel.mesh import Mesh
from sightline.parallel.recompute import apply_recompute
from sightline.parallel.shard import apply_shard
from tests.support.against_transformers import Numbers
from tests.support.processes import run_on_ranks


def rows(seed: int) -> Batch:
    """Return two rows of 3 to 7 documents each, different for every seed."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 16, (14,), generator=generator).tolist()
    documents = [torch.randint(512, (n,), generator=generator).tolist() for n in lengths]
    return Batch.from_documents(documents, length=40)[:2]


def learn(model: Any, batch: Batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = model(
        batch.tokens,
        attention_masks=model.get_attention_masks(batch),
        positions=batch.positions,
        labels=batch.labels,
    )
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()} | model.finish_step()


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert (actual[key] - value).norm() <= 1e-5 * value.norm(), key


@pytest.mark.parametrize(
    "name",
    [
        "llama3-debug",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("llama4-debug", "qwen3-debug-moe", "qwen3_next-debug", "deepseek_v3-debug", "gpt_oss-debug")
        ),
    ],
)
def test_new_documents_cause_no_recompilation(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name)
    torch.manual_seed(0)
    compiled = build_model(name)
    torch._dynamo.reset()
    counters.clear()
    apply_compile(compiled, backend="aot_eager")
    graphs = []
    for seed in range(4):
        assert_equal(learn(compiled, rows(seed)), learn(model, rows(seed)))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs == graphs[:1] * 4
    assert generate_text(compiled) == generate_text(model)
    assert counters["stats"]["unique_graphs"] == graphs[0], "generation compiles nothing"


def generate_text(model: Any) -> str:
    return generate(model, Numbers(), "1 2 3 4", SamplingConfig(max_new_tokens=8, temperature=0.0))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize(("name", "backend"), [("llama3-debug", "reference"), ("qwen3-debug-moe", "sdpa")])
def test_compile_with_recompute(name: str, backend: str, recompute: Literal["full", "selective"]) -> None:
    """A layer without graph breaks is compiled, any other runs eagerly. In both, the routers count once."""
    torch.manual_seed(0)
    model = build_model(name, attention_backend=backend)
    torch.manual_seed(0)
    compiled = build_model(name, attention_backend=backend)
    torch._dynamo.reset()
    counters.clear()
    apply_recompute(compiled, TrainingConfig(recompute=recompute))
    apply_compile(compiled, backend="aot_eager")
    for seed in range(3):
        assert_equal(learn(compiled, rows(seed)), learn(model, rows(seed)))
    assert counters["stats"]["unique_graphs"] == (1 if backend == "reference" else 0)


def learn_on_mesh(rank: int, name: str, compiled: bool) -> dict[str, torch.Tensor]:
    mesh = Mesh(ParallelConfig(expert=2 if "moe" in name else 1), torch.device("cpu"))
    model = build_skeleton(name)
    apply_expert(model, mesh)
    if compiled:
        apply_compile(model, backend="aot_eager")
    apply_shard(model, mesh, dtype="float32")
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    init_model_weights(model)
    results = learn(model, rows(0)[rank : rank + 1])
    assert not compiled or counters["stats"]["unique_graphs"] > 0
    return {key: value.full_tensor() if isinstance(value, DTensor) else value for key, value in results.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3-debug", "qwen3-debug-moe"])
def test_compile_with_fsdp_and_expert_parallelism(name: str) -> None:
    for actual, expected in zip(
        *(run_on_ranks(2, learn_on_mesh, name, compiled) for compiled in (True, False)), strict=True
    ):
        assert_equal(actual, expected)
