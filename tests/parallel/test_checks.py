"""`check_run` rejects what training cannot do, and `sightline plan` rejects the same runs with the same message."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
from typing import Any, get_args

import pytest
import torch

from sightline import config
from sightline.config import AttentionConfig, OptimizerConfig, ParallelConfig, Run, TrainingConfig
from sightline.models import config_of
from sightline.parallel.apply import build_parallel
from sightline.parallel.checks import check_run
from sightline.parallel.mesh import AXES, Mesh
from sightline.planning import estimate as planning
from sightline.planning.activation_memory import ActivationMemory
from sightline.planning.estimate import estimate
from sightline.planning.torch_private import fake_process_group

CPU = torch.device("cpu")
FAMILIES = ("llama3", "llama4", "qwen3", "qwen3_next", "deepseek_v3", "gpt_oss", "vlm")
MODELS = [*(f"{family}-debug" for family in FAMILIES), "qwen3-debug-moe"]
VARLEN = AttentionConfig(backend="varlen")
SCHEDULES = get_args(config.SCHEDULES)


def run_of(name: str, parallel: dict[str, Any], **changes: Any) -> Run:
    sections = {key: changes.pop(key) for key in ("optimizer", "attention") if key in changes}
    options = {"sequence_length": 64, "global_batch_size": 4, "micro_batch_size": 1, "device": "cpu", **changes}
    return Run(
        model=config_of(name), training=TrainingConfig(**options), parallel=ParallelConfig(**parallel), **sections
    )


def error_of(function: Any, *args: Any) -> str | None:
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("run", "world", "text"),
    [
        (run_of("llama3-debug", {"tensor": 3}), 4, "tensor 3 is 3, which does not divide the 4 processes"),
        (run_of("llama3-debug", {"tensor": 4}), 4, "parallel.tensor 4 does not divide the 2 key/value heads"),
        (run_of("llama3-debug", {"tensor": 2}, sequence_length=15), 2, "tensor 2 does not divide the 15 tokens"),
        (run_of("llama3-debug", {"context": 3}), 3, "sequence-length 64 is not divisible by parallel.context 3"),
        (run_of("llama3-debug", {"expert": 2}), 2, "parallel.expert 2: Llama3 has no experts"),
        (run_of("llama3-debug", {}), 8, "training.global-batch-size 4 is not divisible by"),
        (run_of("llama3-debug", {"pipeline": 4}), 4, "4 pipeline stages need at least 4 layers"),
        (
            run_of("llama3-debug", {"pipeline": 2, "pipeline_schedule": "ZBVZeroBubble"}, compile=True),
            2,
            "ZBVZeroBubble computes weight gradients separately .* training.compile does not support",
        ),
        (run_of("llama3-debug", {"offload": True}), 2, "parallel.offload .* are on the CPU already"),
        (run_of("llama3-debug", {"offload": True}, device="cuda"), 1, "parallel.offload .* not sharded by this mesh"),
        (
            run_of("llama3-debug", {"offload": True}, device="cuda", optimizer=OptimizerConfig(name="muon")),
            2,
            "optimizer.name muon .* parallel.offload .*--parallel.no-offload, or --optimizer.name adamw",
        ),
        (
            run_of("llama3-debug", {}, attention=AttentionConfig(backend="flex")),
            1,
            "--attention.backend.* 'flex': flex does not train on a CPU.*supported backends: sdpa.*tiled, reference",
        ),
        (
            run_of("llama3-debug", {}, device="cuda", attention=AttentionConfig(backend="tiled")),
            1,
            "--attention.backend.* 'tiled': tiled runs on a CPU only",
        ),
        (
            run_of("llama3-debug", {"context": 2}, device="cuda", dtype="bfloat16", attention=VARLEN),
            2,
            "'varlen': varlen needs queries and keys to be the same tokens; supported backends: flex, sdpa, reference$",
        ),
        (
            run_of("llama3-debug", {}, device="cuda", dtype="bfloat16", attention=VARLEN),
            1,
            "'varlen': varlen needs queries and keys to be the same tokens; .*--logging.sample-tokens 0",
        ),
    ],
)  # fmt: skip
def test_plan_and_training_reject_a_run_with_the_same_message(run: Run, world: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_run(run, world, torch.device(run.training.device))
    assert error_of(estimate, run, world) == error_of(check_run, run, world, torch.device(run.training.device))


def draw(numbers: random.Random) -> tuple[Run, int]:
    """Return a valid config and a number of ranks, which may not fit each other.

    Raises:
        ValueError: if the config alone is invalid already.
    """
    pick = numbers.choice
    model = config_of(pick(MODELS))
    changes = {"vocab_size": pick((512, 512, 512, 513)), "tied_embeddings": numbers.random() < 0.1}
    degrees = {axis: pick((1, 1, 2, 3)) for axis in AXES} | {"shard": pick((1, 1, 2))}
    run = Run(
        model=dataclasses.replace(model, num_layers=pick((model.num_layers, 4)), **changes),
        training=TrainingConfig(
            sequence_length=pick((32, 48, 33)),
            global_batch_size=pick((4, 8, 12)),
            micro_batch_size=pick((1, 1, 2)),
            recompute=pick(("none", "selective", "full")),
            compile=numbers.random() < 0.2,
            device="cpu",
        ),
        parallel=ParallelConfig(
            expert=pick((1, 1, 1, 2)),
            pipeline_schedule=pick(SCHEDULES),
            offload=numbers.random() < 0.05,
            **degrees,
        ),
        attention=AttentionConfig(backend=pick(("auto", "auto", "auto", "tiled", "flex"))),
    )
    return run, math.prod(degrees.values()) + (numbers.random() < 0.05)


def build(run: Run, world: int) -> None:
    """Do what training does before it reads data, on rank 0 of a fake process group."""
    check_run(run, world, CPU)
    with fake_process_group(world, 0):
        eager = dataclasses.replace(run.training, compile=False)  # compiles at the first forward only
        build_parallel(run.model, eager, Mesh(run.parallel, CPU), attention_backend=run.attention.backend)


def test_drawn_runs_have_the_same_verdict_and_message(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = ActivationMemory(0.0, 0.0, 0.0, 0.0, 0.0)  # tracing is slow and rejects nothing
    monkeypatch.setattr(planning, "trace", lambda stage, *others: dict.fromkeys(stage.layers, nothing))
    numbers = random.Random(0)
    verdicts: list[str | None] = []
    while len(verdicts) < 300:
        with contextlib.suppress(ValueError):
            drawn = draw(numbers)
        verdicts.append(error_of(build, *drawn))
        assert error_of(estimate, *drawn) == verdicts[-1], drawn
    kinds = {verdict.split()[0] for verdict in verdicts if verdict is not None}
    assert verdicts.count(None) >= 20 and len(kinds) >= 8, (verdicts.count(None), sorted(kinds))
