"""Every family under context parallelism against the same model on one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.utils import counters

from sightline import Batch
from sightline.config import Parallel, Training
from sightline.masks import causal, chunked, document, global_tokens, prefix_lm, shared_prefix, sliding_window
from sightline.models import MODELS, build_model
from sightline.parallel.context.split import split_context
from sightline.parallel.expert import share_counts
from sightline.parallel.mesh import Mesh
from sightline.parallel.recompute import apply_recompute
from tests.parallel.context.rows import LENGTHS, pack, pack_images
from tests.parallel.processes import on_processes

CONFIGS: dict[str, Any] = {
    "llama3": MODELS["llama3-debug"],
    "llama4": MODELS["llama4-debug"],
    "qwen3": MODELS["qwen3-debug"],
    "qwen3-moe": MODELS["qwen3-debug-moe"],
    "qwen3_next": MODELS["qwen3_next-debug"],
    "deepseek_v3": replace(MODELS["deepseek_v3-debug"], prediction_weight=0.3),
    "gpt_oss": MODELS["gpt_oss-debug"],
    "vlm": MODELS["vlm-debug"],
}
RULES = ("window", "chunk", "prefix", "shared", "global", "both")
ORDERS = ("balanced", "contiguous", "headtail", "roundrobin")
LIMIT = 1e-5  # relative


def batch_of(config: Any) -> Batch:
    return pack_images(config) if hasattr(config, "image_token") else pack(LENGTHS, config.vocab_size)


def inputs_of(model: Any, batch: Batch, rule: str | None) -> dict[str, Any]:
    """What prepare_batch makes; under `rule`, with another mask than the model's own."""
    masks = model.get_attention_masks(batch) if rule is None else mask_of(batch, rule)
    facts = {"tokens": batch.tokens, "labels": batch.labels, "positions": batch.positions}
    return {**facts, "attention_masks": masks, **batch.extra}


def mask_of(batch: Batch, rule: str) -> Any:
    rows, length = batch.shape
    own = document(batch.document_ids)
    before = causal(rows, length)
    return {
        "window": before & own & sliding_window(rows, length, 7),
        "chunk": before & own & chunked(batch.positions, 9),
        "prefix": (before | prefix_lm(batch.positions, torch.full_like(batch.positions, 6))) & own,
        "shared": shared_prefix(batch.document_ids, (batch.document_ids // 3 * 3).clamp(min=-1)) & before,
        "global": (before & own & sliding_window(rows, length, 5))
        | (global_tokens(batch.positions == 0) & before & own),
        "both": own,
    }[rule]


def measure(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The sum of the token losses and every parameter's gradient."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **{name: gradient.clone() for name, gradient in gradients.items()}}


def compare(rank: int, degree: int, cases: list[tuple[str, str, str, str | None]]) -> dict[Any, tuple[str, float]]:
    """Of each case (family, order, backend, rule) the number that is furthest from one process's, and how far it is."""
    return {case: worst(degree, *case) for case in cases}


def worst(degree: int, family: str, order: Any, backend: str, rule: str | None) -> tuple[str, float]:
    torch.manual_seed(0)
    model = build_model(CONFIGS[family], attention_backend=backend)
    inputs = inputs_of(model, batch_of(model.config), rule)
    truth = measure(model, inputs)
    mesh = Mesh(Parallel(context=degree, context_order=order), torch.device("cpu"))
    share_counts(model, mesh)
    return furthest(measure(model, split_context(inputs, model, mesh)), truth)


def furthest(found: dict[str, Tensor], truth: dict[str, Tensor]) -> tuple[str, float]:
    """Added up over the processes, the number that is furthest from the truth, and how far it is."""
    assert found.keys() == truth.keys()
    for value in found.values():
        dist.all_reduce(value)
    far = {name: float((found[name] - truth[name]).norm() / size_of(name, truth)) for name in truth}
    return max(far.items(), key=lambda item: item[1])


def size_of(name: str, truth: dict[str, Tensor]) -> Tensor:
    """What a difference is relative to."""
    if name.startswith("vision") and name.endswith("key.bias"):
        # Without positions the softmax does not see a bias of all keys: its gradient is 0 but for rounding.
        name = name.replace("bias", "weight")
    return truth[name].norm().clamp(min=1e-9)


def check(degree: int, cases: list[tuple[str, str, str, str | None]]) -> None:
    for of_rank in on_processes(degree, compare, degree, cases):
        for case, (name, far) in of_rank.items():
            assert far < LIMIT, f"{case}: {name} is {far:.1e} off"


def test_every_family_on_two_processes() -> None:
    check(2, [(family, "balanced", "sdpa", None) for family in CONFIGS])


def test_orders_backends_and_rules_on_four_processes() -> None:
    check(
        4,
        [
            ("llama3", "contiguous", "reference", "prefix"),
            ("llama3", "headtail", "sdpa", "shared"),
            ("llama3", "balanced", "reference", "global"),
            ("llama3", "roundrobin", "sdpa", "both"),
            ("gpt_oss", "roundrobin", "reference", None),
            ("llama4", "headtail", "sdpa", None),
            ("deepseek_v3", "contiguous", "reference", None),
            ("vlm", "balanced", "sdpa", None),
        ],
    )


def compiled(rank: int, seeds: int) -> list[int]:
    """How many graphs there are after each of several layouts."""
    model = build_model("llama3-debug", attention_backend="reference")
    mesh = Mesh(Parallel(context=2), torch.device("cpu"))
    for layer in model.layers.values():
        layer.compile(backend="eager", dynamic=False)
    graphs = []
    for seed in range(seeds):
        lengths = torch.randint(1, 30, (3, 2), generator=torch.Generator().manual_seed(seed)).tolist()
        measure(model, split_context(inputs_of(model, pack(lengths), None), model, mesh))
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


def test_compiled_layers_meet_new_layouts_without_compiling_again() -> None:
    first, *later = on_processes(2, compiled, 4)[0]
    assert first > 0 and set(later) == {first}


def recomputes(rank: int) -> list[float]:
    """How far gradients are from those of one process where layers compute again what they did not keep."""
    found = []
    for family in ("llama3", "deepseek_v3", "qwen3_next"):
        for kept in ("selective", "full"):
            torch.manual_seed(0)
            model = build_model(CONFIGS[family])
            inputs = inputs_of(model, batch_of(model.config), None)
            truth = measure(model, inputs)
            mesh = Mesh(Parallel(context=2), torch.device("cpu"))
            share_counts(model, mesh)
            apply_recompute(model, Training(recompute=kept))  # type: ignore[arg-type]
            found.append(furthest(measure(model, split_context(inputs, model, mesh)), truth)[1])
    return found


@pytest.mark.slow
def test_layers_that_recompute_exchange_again() -> None:
    assert max(on_processes(2, recomputes)[0]) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_every_family_and_rule_in_every_order(degree: int, order: str) -> None:
    heads = 2  # of the debug sizes' layers that walk along whole rows
    families = [family for family in CONFIGS if degree <= heads or family != "qwen3_next"]
    check(degree, [(family, order, backend, None) for family in families for backend in ("sdpa", "reference")])
    check(degree, [("llama3", order, backend, rule) for rule in RULES for backend in ("sdpa", "reference")])
