"""Pipelines against one process: losses, all gradients, the routers' counts, validation and generated text.

All rows of a batch have different documents. A stage that computes a micro-batch with the mask, the positions or the
labels of another one changes the loss: `test_mask_of_a_wrong_microbatch_changes_the_loss` shows by how much.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sightline import Batch
from sightline.config import ParallelConfig, TrainingConfig
from sightline.generation import SamplingConfig, generate
from sightline.layers import routers_of
from sightline.masks import AttentionMask
from sightline.models import MODELS, build_model, build_skeleton, init_model_weights
from sightline.parallel.mesh import Mesh
from sightline.parallel.pipeline import PipelinedModel
from sightline.parallel.pipeline_stages import build_local_stages
from sightline.parallel.recompute import apply_recompute
from sightline.parallel.shard import apply_shard
from tests.support.processes import run_on_ranks

ROWS, LENGTH, MICRO = 8, 32, 1
SCALE = 1 / 200
CONFIGS = {
    "llama3": replace(MODELS["llama3-debug"], num_layers=4),
    "llama4": replace(MODELS["llama4-debug"], aux_loss_coef=0.1),
    "qwen3": replace(MODELS["qwen3-debug"], num_layers=4),
    "qwen3-moe": replace(MODELS["qwen3-debug-moe"], num_layers=4, aux_loss_coef=0.1),
    "qwen3_next": replace(MODELS["qwen3_next-debug"], aux_loss_coef=0.1),
    "deepseek_v3": replace(MODELS["deepseek_v3-debug"], num_layers=4, aux_loss_coef=0.1),
    "gpt_oss": replace(MODELS["gpt_oss-debug"], num_layers=4, aux_loss_coef=0.1),
    "vlm": replace(MODELS["vlm-debug"], num_layers=4),
    "deep": replace(MODELS["qwen3-debug-moe"], num_layers=9, hidden_size=32, aux_loss_coef=0.1),
}
SCHEDULES = ("GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


def make_batch(name: str) -> Batch:
    """Return rows of documents of random lengths with padding; for the VLM, each with one image of a different size."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for row in range(ROWS):
        lengths = torch.randint(1, 14, (8,), generator=generator).tolist()
        if name == "vlm":
            lengths[0] = 12
        ids = [torch.randint(1, 500, (length,), generator=generator).tolist() for length in lengths]
        if name == "vlm":
            ids[0][2 : 2 + 2 * (1 + row % 4)] = [511] * (2 * (1 + row % 4))
        documents: list[list[int]] = []
        for document in ids:
            if sum(map(len, documents)) + len(document) <= LENGTH:
                documents.append(document)
        rows.append(Batch.from_documents(documents, LENGTH))
    fields = {
        n: torch.cat([getattr(row, n) for row in rows]) for n in ("tokens", "labels", "document_ids", "positions")
    }
    extra = {}
    if name == "vlm":
        fields["labels"] = fields["labels"].masked_fill(fields["labels"] == 511, -100)
        extra["patch_grid"] = torch.tensor([[[4, 2 * (1 + row % 4)]] for row in range(ROWS)])
        extra["patches"] = torch.randn(ROWS, 32, CONFIGS["vlm"].vision.patch_channels, generator=generator)
    return Batch(**fields, extra=extra)


def inputs_of(model: Any, batch: Batch) -> dict[str, Any]:
    masks = model.get_attention_masks(batch)
    inputs = {"tokens": batch.tokens, "labels": batch.labels, "positions": batch.positions, "attention_masks": masks}
    return inputs | batch.extra


def each_mask(masks: Any, change: Any) -> Any:
    return {n: change(m) for n, m in masks.items()} if isinstance(masks, dict) else change(masks)


def mask_of_first(mask: AttentionMask) -> AttentionMask:
    """Return the mask of the first micro-batch, repeated for all micro-batches."""
    return mask[torch.arange(MICRO).repeat(ROWS // MICRO)]


class Letters:
    """A tokenizer with one token per character and no end-of-text token."""

    eos_id = -1

    def encode_prompt(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids)


def generate_text(model: Any) -> str:
    return generate(
        model, Letters(), "a cat and a dog in one long row", SamplingConfig(max_new_tokens=10, temperature=0)
    )


def results_of(stages: list[Any], loss: Tensor) -> dict[str, Any]:
    """Return loss, gradients and router counts of a step on one rank."""
    gradients = {name: p.grad for stage in stages for name, p in stage.named_parameters()}
    counts = {name: router.counts for stage in stages for name, router in routers_of(stage).items()}
    return {"loss": loss.detach(), "gradients": gradients, "counts": counts}


def run_single_process(name: str, dtype: str = "float32") -> dict[str, Any]:
    """Return the results of the same rows on one process, one micro-batch after the other, and of their validation."""
    torch.manual_seed(0)
    model = build_model(CONFIGS[name])
    inputs = [inputs_of(model, make_batch(name)[i : i + MICRO]) for i in range(0, ROWS, MICRO)]
    loss = torch.zeros(())
    for part in inputs:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            part_loss = model(**part) * SCALE
        part_loss.backward()
        loss += part_loss.detach()
    results = results_of([model], loss)
    model.eval()
    with torch.no_grad():
        results["evaluated"] = sum(model(**part) for part in inputs)
    return results | {"text": generate_text(model)}


def build(config: Any, schedule: Any, training: TrainingConfig, pipeline: int = 2) -> PipelinedModel:
    """Build this rank's stages; if the world is larger than the pipeline, FSDP shards the stages and the rows."""
    mesh = Mesh(ParallelConfig(pipeline=pipeline, pipeline_schedule=schedule), torch.device("cpu"))
    full_model = build_skeleton(config)
    stages = build_local_stages(full_model, mesh)
    for stage in stages:
        apply_recompute(stage, training)
        if mesh.size("shard") > 1:
            apply_shard(stage, mesh, dtype=training.dtype)
        stage.to_empty(device="cpu")
    torch.manual_seed(0)
    init_model_weights(*stages)
    return PipelinedModel(mesh, full_model, stages, dtype=training.dtype, micro_batch_size=MICRO)


def run_pipeline(
    rank: int,
    name: str,
    schedule: str,
    training: TrainingConfig,
    steps: int = 1,
    wrong_masks: bool = False,
    pipeline: int = 2,
) -> dict[str, Any]:
    model = build(CONFIGS[name], schedule, training, pipeline)
    inputs = inputs_of(model, make_batch(name))
    if wrong_masks:
        inputs["attention_masks"] = each_mask(inputs["attention_masks"], mask_of_first)
    for _ in range(steps):
        for stage in model.stages:
            stage.zero_grad()
            for router in routers_of(stage).values():
                router.counts = None
        loss = model.forward_backward(inputs, SCALE)
        results = results_of(model.stages, loss)
        model.train(False)
        parts = [inputs_of(model, make_batch(name)[i : i + MICRO]) for i in range(0, ROWS, MICRO)]
        results["evaluated"] = sum(model.evaluate(part) for part in parts)
        results["text"] = generate_text(model.generation_model)
        model.train()
    return results


def difference(actual: Tensor, expected: Tensor) -> float:
    """Return the greatest absolute difference, relative to the greatest absolute value."""
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-20))


def check(parts: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Check that the results of all ranks together equal those of one process, each gradient on one rank."""
    for key in ("loss", "evaluated"):
        assert difference(sum(part[key] for part in parts), expected[key]) < 1e-5, key
    gradients = [item for part in parts for item in part["gradients"].items()]
    assert sorted(name for name, _ in gradients) == sorted(expected["gradients"])
    for name, gradient in gradients:
        assert difference(gradient, expected["gradients"][name]) < 1e-5, name
    counts = {name: count for part in parts for name, count in part["counts"].items()}
    assert {name: count.tolist() for name, count in counts.items()} == {
        name: count.tolist() for name, count in expected["counts"].items()
    }
    assert [part["text"] for part in parts] == [expected["text"]] * len(parts)


FAST = {("llama3", "GPipe"), ("qwen3-moe", "Interleaved1F1B"), ("gpt_oss", "ZBVZeroBubble"), ("llama4", "1F1B")}
FAST |= {("vlm", "1F1B"), ("deepseek_v3", "DualPipeV")}
FAMILIES = [name for name in CONFIGS if name != "deep"]
MATRIX = [(family, "1F1B") for family in FAMILIES] + [("llama3", schedule) for schedule in SCHEDULES]
MATRIX += [(family, schedule) for family in FAMILIES for schedule in SCHEDULES if schedule not in ("GPipe", "1F1B")]


@pytest.mark.parametrize(
    ("family", "schedule"),
    [pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow) for case in dict.fromkeys(MATRIX)],
)
def test_pipeline_equals_one_process(family: str, schedule: str) -> None:
    check(run_on_ranks(2, run_pipeline, family, schedule, TrainingConfig(), 2), run_single_process(family))


@pytest.mark.parametrize(
    "schedule", [pytest.param(s, marks=[] if s == "ZBVZeroBubble" else pytest.mark.slow) for s in SCHEDULES]
)
def test_pipeline_of_four_ranks_equals_one_process(schedule: str) -> None:
    """Most ranks have neither the embedding nor the head."""
    parts = run_on_ranks(4, run_pipeline, "deep", schedule, TrainingConfig(), 1, False, 4)
    check(parts, run_single_process("deep"))


@pytest.mark.parametrize("family", ["llama3", pytest.param("llama4", marks=pytest.mark.slow)])
def test_mask_of_a_wrong_microbatch_changes_the_loss(family: str) -> None:
    """With the mask of the first micro-batch for all, errors of loss and gradients far exceed all tolerances here."""
    expected = run_single_process(family)
    parts = run_on_ranks(2, run_pipeline, family, "1F1B", TrainingConfig(), 1, True)
    assert difference(sum(part["loss"] for part in parts), expected["loss"]) > 1e-3
    differences = {
        name: difference(gradient, expected["gradients"][name])
        for part in parts
        for name, gradient in part["gradients"].items()
    }
    assert min(value for name, value in differences.items() if "attention.query" in name) > 1e-2, differences


def run_pipeline_with_fsdp(rank: int, name: str, schedule: str, training: TrainingConfig) -> dict[str, Any]:
    """Run two pipelines with half of the rows each; FSDP shards each stage across the two ranks that compute it."""
    model = build(CONFIGS[name], schedule, training)
    half = ROWS // 2
    first = model.mesh.index("data") * half
    inputs = inputs_of(model, make_batch(name)[first : first + half])
    for _ in range(2):
        for stage in model.stages:
            stage.zero_grad()
        loss = model.forward_backward(inputs, SCALE)
        model.train(False)
        evaluated = model.evaluate(inputs)
        model.train()
    gradients = {}
    for parameter_name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) and parameter.to_local().numel() < parameter.numel(), parameter_name
        gradients[parameter_name] = parameter.grad.full_tensor()
    return {"loss": loss, "evaluated": evaluated, "gradients": gradients, "text": generate_text(model.generation_model)}


@pytest.mark.parametrize(
    ("family", "schedule"),
    [
        ("llama3", "1F1B"),
        ("qwen3-moe", "InterleavedZeroBubble"),
        *(pytest.param("llama3", schedule, marks=pytest.mark.slow) for schedule in SCHEDULES if schedule != "1F1B"),
    ],
)
def test_pipelines_with_fsdp_equal_one_process(family: str, schedule: str) -> None:
    """Gradients are summed over the rows of both pipelines once, after the last micro-batch."""
    expected, parts = (
        run_single_process(family),
        run_on_ranks(4, run_pipeline_with_fsdp, family, schedule, TrainingConfig()),
    )
    for key in ("loss", "evaluated"):
        assert difference(sum(part[key] for part in parts), expected[key]) < 1e-5, key
    for part in parts:
        for name, gradient in part["gradients"].items():
            assert difference(gradient, expected["gradients"][name]) < 1e-5, name
        assert part["text"] == expected["text"]


RECOMPUTED = [("1F1B", "selective"), ("InterleavedZeroBubble", "full"), ("ZBVZeroBubble", "full"), ("1F1B", "full")]


@pytest.mark.parametrize(
    ("schedule", "recompute"),
    [pytest.param(*case, marks=[] if case == RECOMPUTED[1] else pytest.mark.slow) for case in RECOMPUTED],
)
def test_recompute_in_a_pipeline(schedule: str, recompute: Any) -> None:
    """Several micro-batches are in flight at once, and schedules with split backward may recompute a layer twice."""
    parts = run_on_ranks(2, run_pipeline, "qwen3-moe", schedule, TrainingConfig(recompute=recompute))
    check(parts, run_single_process("qwen3-moe"))


def test_bfloat16_equals_one_process() -> None:
    """Forwards run under autocast, backwards do not; the residual stream between stages stays in float32."""
    expected = run_single_process("qwen3-moe", "bfloat16")
    parts = run_on_ranks(2, run_pipeline, "qwen3-moe", "Interleaved1F1B", TrainingConfig(dtype="bfloat16"))
    assert difference(sum(part["loss"] for part in parts), expected["loss"]) < 1e-5
    for part in parts:
        for name, gradient in part["gradients"].items():
            assert difference(gradient, expected["gradients"][name]) < 1e-5, name
    float32 = run_single_process("qwen3-moe")
    assert difference(expected["loss"], float32["loss"]) > 1e-5, "bfloat16 must change the loss"


@pytest.mark.slow
def test_weights_gathered_in_bfloat16() -> None:
    """With FSDP's mixed precision, the hidden states between stages are bfloat16 too."""
    expected = run_single_process("llama3")
    parts = run_on_ranks(4, run_pipeline_with_fsdp, "llama3", "Interleaved1F1B", TrainingConfig(dtype="bfloat16"))
    loss = sum(part["loss"] for part in parts)
    assert 1e-6 < difference(loss, expected["loss"]) < 1e-2
    for part in parts:
        for name, gradient in part["gradients"].items():
            assert difference(gradient, expected["gradients"][name]) < 0.1, name
