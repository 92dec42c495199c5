"""Estimates against measurements of real runs and against counts by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sightline import Batch
from sightline.config import OptimizerConfig, ParallelConfig, Run, TrainingConfig
from sightline.models import build_skeleton, config_of
from sightline.parallel.apply import build_parallel
from sightline.parallel.mesh import Mesh
from sightline.planning.activation_memory import MemoryTracker
from sightline.planning.estimate import RankEstimate, estimate
from sightline.planning.timeline import tasks, timeline
from sightline.training.step import prepare_batch
from tests.support.processes import run_on_ranks

CPU = torch.device("cpu")
STATE = ("parameters", "gradients", "optimizer_state")
FAMILIES = [
    "llama3-debug", "llama4-debug", "qwen3-debug", "qwen3-debug-moe", "deepseek_v3-debug", "gpt_oss-debug",
    "qwen3_next-debug",
]  # fmt: skip


def run_of(name: str, degrees: dict[str, Any], **training: Any) -> Run:
    options = {"sequence_length": 64, "global_batch_size": 4, "micro_batch_size": 2, "device": "cpu", **training}
    return Run(model=config_of(name), parallel=ParallelConfig(**degrees), training=TrainingConfig(**options))


def rows_of(run: Run, mesh: Mesh) -> Batch:
    """This rank's rows of a step, with documents of 5 to 40 tokens."""
    length, vocab_size = run.training.sequence_length, run.model.vocab_size
    lengths = [5 + 7 * i % 36 for i in range(run.training.global_batch_size * length // 16)]
    documents = [[(i * 31 + t * 7) % (vocab_size - 8) for t in range(n)] for i, n in enumerate(lengths)]
    batch = Batch.from_documents(documents, length=length)[: run.training.global_batch_size]
    local_rows = run.training.global_batch_size // mesh.size("data")
    return batch[mesh.index("data") * local_rows : (mesh.index("data") + 1) * local_rows]


def local(x: Tensor) -> Tensor:
    return x.to_local() if isinstance(x, DTensor) else x


def local_bytes(tensors: Any) -> int:
    return sum(local(x).nbytes for x in tensors)


def measure(rank: int, run: Run) -> dict[str, int]:
    """Bytes of a rank's state after a step, of the activations that autograd saves for the first backward, and of the
    peak of forward and backward including gradients."""
    torch.manual_seed(0)
    mesh = Mesh(run.parallel, CPU)
    model = build_parallel(run.model, run.training, mesh, attention_backend=run.attention.backend)
    parameters = [p for _, p in model.named_parameters()]
    parameter_pointers = {local(p).untyped_storage().data_ptr() for p in parameters}
    saved: dict[int, Tensor] = {}

    def save(x: Tensor) -> Tensor:
        if local(x).untyped_storage().data_ptr() not in parameter_pointers:
            saved[local(x).untyped_storage().data_ptr()] = x  # keeps it alive, so that its pointer is not reused
        return x

    batch = rows_of(run, mesh)
    inputs = prepare_batch(
        model, batch[: model.rows_per_call(batch.shape[0], run.training.micro_batch_size)], None, CPU
    )
    inputs = model.local_inputs(inputs)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        model.forward_backward(inputs, 1.0, last=True)
    bytes_saved = sum(local(x).untyped_storage().nbytes() for x in saved.values())
    saved.clear()
    for p in parameters:
        p.grad = None
    with MemoryTracker(parameters) as tracker:
        model.forward_backward(inputs, 1.0, last=True)
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name.startswith("exp_avg")]
    return {
        "parameters": local_bytes(parameters),
        "gradients": local_bytes(p.grad for p in parameters if p.grad is not None),
        "optimizer_state": local_bytes(moments),
        "peak": int(tracker.peak),
        "saved": bytes_saved,
    }


def state_of(rank: RankEstimate) -> dict[str, int]:
    return {kind: getattr(rank.memory, kind) for kind in STATE}


@pytest.mark.parametrize("name", [*FAMILIES, pytest.param("llama3-tiny", marks=pytest.mark.slow)])
def test_estimate_equals_measurement_on_one_rank(name: str) -> None:
    run = run_of(name, {}, sequence_length=256, micro_batch_size=4)
    found, measured = estimate(run, 1), measure(0, run)
    assert state_of(found.largest) == {kind: measured[kind] for kind in STATE}
    assert found.largest.memory.activations == pytest.approx(measured["saved"], rel=0.1)
    total = measured["parameters"] + measured["optimizer_state"] + measured["peak"]
    assert found.largest.memory.total == pytest.approx(total, rel=0.1)
    assert found.parameters == found.largest.parameters


def test_recompute_saves_fewer_activations() -> None:
    memory = {
        mode: estimate(run_of("llama3-debug", {}, recompute=mode, sequence_length=256), 1).largest.memory
        for mode in ("none", "selective", "full")
    }
    assert memory["full"].activations < 0.6 * memory["selective"].activations < 0.5 * memory["none"].activations
    assert memory["full"].workspace > memory["none"].workspace


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("llama3-debug", {"shard": 2, "tensor": 2}),
        ("llama3-debug", {"pipeline": 2, "shard": 2}),
        ("qwen3-debug-moe", {"shard": 4, "expert": 2}),
        pytest.param("llama3-debug", {"replicate": 2, "shard": 2}, marks=pytest.mark.slow),
        pytest.param("deepseek_v3-debug", {"context": 2, "tensor": 2, "expert": 2}, marks=pytest.mark.slow),
        pytest.param("gpt_oss-debug", {"pipeline": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_estimate_equals_measurement_on_every_rank(name: str, degrees: dict[str, int]) -> None:
    run = run_of(name, degrees, micro_batch_size=1)
    measured = run_on_ranks(4, measure, run)
    stages = degrees.get("pipeline", 1)
    for stage, estimated in enumerate(estimate(run, 4).ranks):
        ranks = measured[stage * 4 // stages : (stage + 1) * 4 // stages]
        assert state_of(estimated) == {kind: max(rank[kind] for rank in ranks) for kind in STATE}


def test_tensor_parallel_activations() -> None:
    run = run_of("llama3-debug", {"tensor": 2})
    measured = run_on_ranks(2, measure, run)
    found = estimate(run, 2).largest
    assert found.memory.activations == pytest.approx(measured[0]["saved"], rel=0.1)
    assert set(found.traffic) == {"tensor parallel hidden states"}


def test_parameters_on_thousands_of_ranks() -> None:
    """FSDP shards the first dim of every parameter: rank 0 has ceil(n / ranks) of its n rows."""
    run = run_of("llama3-debug", {"shard": 512, "replicate": 8}, global_batch_size=4096, micro_batch_size=1)
    found = estimate(run, 4096)
    skeleton = build_skeleton("llama3-debug")
    local_parameters = sum(math.ceil(p.shape[0] / 512) * math.prod(p.shape[1:]) for p in skeleton.parameters())
    assert found.largest.parameters == local_parameters and found.mesh.world == 4096


def test_llama3_8b_by_hand() -> None:
    run = run_of("llama3-8b", {}, global_batch_size=8, micro_batch_size=1, dtype="bfloat16")
    found = estimate(run, 8)
    assert found.parameters == 8_030_261_248
    largest = found.largest
    assert largest.parameters == 8_030_261_248 // 8 and largest.memory.state == 16 * largest.parameters
    assert found.matmul_flops == 6 * (8_030_261_248 - 128_256 * 4096 - 65 * 4096) * 8 * 64  # no embedding, no norms
    # All-gather in bfloat16, twice for layers and once for other modules; gradients once, in float32; 7 of 8 shards.
    outside = 2 * 128_256 * 4096 + 4096
    assert largest.traffic == {
        "all-gather parameters": 2 * (2 * (8_030_261_248 - outside) + outside) * 7 / 8,
        "reduce-scatter gradients": 4 * 8_030_261_248 * 7 / 8,
    }


def test_muon_has_half_the_optimizer_state_for_matrices() -> None:
    run = run_of("llama3-8b", {}, global_batch_size=8, micro_batch_size=1)
    largest = estimate(replace(run, optimizer=OptimizerConfig(name="muon")), 8).largest
    outside = 2 * 128_256 * 4096 + 65 * 4096  # embedding, output projection, norms
    assert largest.memory.optimizer_state == 4 * (8_030_261_248 + outside) / 8


def test_traffic_of_the_other_axes_by_hand() -> None:
    """llama3-debug: hidden size 64, 2 layers, float32; qwen3-debug-moe routes each token to top-k experts."""
    tokens, hidden = 2 * 64, 2 * 64 * 64 * 4
    found = estimate(run_of("llama3-debug", {"tensor": 2}, global_batch_size=2), 2).largest.traffic
    # Attention and MLP of 2 layers all-gather and reduce-scatter, forward and backward; embedding, head and loss
    # communicate twice; half of each tensor is remote.
    assert found["tensor parallel hidden states"] == pytest.approx((2 * 2 * 4 + 3 * 2) * hidden / 2, rel=0.02)
    found = estimate(run_of("llama3-debug", {"pipeline": 2}, micro_batch_size=1), 2).largest.traffic
    assert found["pipeline send/recv"] == 4 * 64 * 64 * 4  # the gradients of 4 rows
    run = run_of("qwen3-debug-moe", {"expert": 2}, micro_batch_size=2, global_batch_size=4)
    top_k, layers = run.model.experts_per_token, run.model.num_layers
    found = estimate(run, 2).largest.traffic
    assert found["expert all-to-all, even load"] == layers * 4 * top_k * tokens * run.model.hidden_size * 4 / 2
    found = estimate(run_of("llama3-debug", {"context": 2}, global_batch_size=2), 2).largest.traffic
    keys_and_values = 2 * 2 * 16 * 4
    assert found["context exchange, at most"] == 2 * 2 * 64 * keys_and_values  # forward and backward, layers, tokens


def test_runs_that_training_rejects_are_rejected() -> None:
    with pytest.raises(ValueError, match="does not divide the 4 processes"):
        estimate(run_of("llama3-debug", {"tensor": 3}), 4)
    with pytest.raises(ValueError, match=r"parallel\.tensor 8 does not divide"):
        estimate(run_of("llama3-debug", {"tensor": 8}), 8)
    with pytest.raises(ValueError, match="tensor 2 does not divide the 65 tokens of a row"):
        estimate(run_of("llama3-debug", {"tensor": 2}, sequence_length=65), 2)
    with pytest.raises(ValueError, match="global-batch-size 4 is not divisible"):
        estimate(run_of("llama3-debug", {}), 8)


def test_tasks_of_1f1b() -> None:
    assert tasks(ParallelConfig(pipeline=2), 3) == [
        [("F", 0, 0), ("F", 0, 1), ("B", 0, 0), ("F", 0, 2), ("B", 0, 1), ("B", 0, 2)],
        [("F", 1, 0), ("B", 1, 0), ("F", 1, 1), ("B", 1, 1), ("F", 1, 2), ("B", 1, 2)],
    ]


@pytest.mark.parametrize(
    ("schedule", "bubble", "in_flight"),
    [
        ("GPipe", 3 / 11, 8),  # (ranks - 1) / (micro-batches + ranks - 1)
        ("1F1B", 3 / 11, 4),
        ("Interleaved1F1B", 3 / 19, 11),  # stages take half the time, so half the bubble
        ("LoopedBFS", 3 / 19, 16),
        ("InterleavedZeroBubble", 1 / 17, 8),
        ("ZBVZeroBubble", 1 / 17, 8),
        ("DualPipeV", 1 / 17, 9),
    ],
)
def test_bubble_and_micro_batches_in_flight_of_every_schedule(schedule: Any, bubble: float, in_flight: int) -> None:
    found = timeline(ParallelConfig(pipeline=4, pipeline_schedule=schedule), 8)
    assert found.bubble == pytest.approx(bubble)
    assert sum(found.in_flight[0].values()) == in_flight


def test_the_first_pipeline_rank_has_most_activations() -> None:
    run = run_of("llama3-debug", {"pipeline": 2}, micro_batch_size=1)
    run = replace(run, model=replace(run.model, num_layers=4))
    first, last = estimate(run, 2).ranks
    assert first.layers + last.layers == 4 and (first.rank, last.rank) == (0, 1)
    assert first.memory.activations / first.layers > 1.5 * last.memory.activations / last.layers - 4 * 64 * 512
