"""Compiled layers compute what they did, and other documents compile nothing anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from sightline import Batch
from sightline.models import build_model
from sightline.parallel.compile import apply_compile


def rows(seed: int) -> Batch:
    """Two rows of other documents for every seed, 3 to 7 a row."""
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
def test_one_compilation_serves_all_documents(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name)
    torch.manual_seed(0)
    compiled = build_model(name)
    torch._dynamo.reset()
    apply_compile(compiled, backend="aot_eager")
    graphs = []
    for seed in range(4):
        expected, got = learn(model, rows(seed)), learn(compiled, rows(seed))
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            assert (got[key] - value).norm() <= 1e-5 * value.norm(), key
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs == graphs[:1] * 4
