"""Every parallelism in the order in which it is applied to a model."""

from __future__ import annotations

from typing import Any

from sightline import config
from sightline.config import Run
from sightline.models import build_model, build_skeleton, draw_weights
from sightline.parallel.expert import apply_expert
from sightline.parallel.mesh import Mesh, divisors
from sightline.parallel.parallel_model import ParallelModel
from sightline.parallel.shard import apply_shard


def build_parallel(run: Run, mesh: Mesh) -> ParallelModel:
    """The run's model with fresh weights, as this process holds it: on any mesh the same ones as on one process.

    Errors: ValueError for degrees the model cannot be cut by, naming those that it can.
    """
    backend = run.attention.backend
    if mesh.world == 1:
        with mesh.device:
            model = build_model(run.model, attention_backend=backend)
        apply_memory(model, run.training)
        return ParallelModel(mesh, model, [model], dtype=run.training.dtype)
    whole = build_skeleton(run.model, attention_backend=backend)
    stages = [build_skeleton(run.model, attention_backend=backend)]
    for stage in stages:
        parallelize(stage, mesh, run)
        stage.to_empty(device="cpu" if mesh.parallel.offload else mesh.device)
    draw_weights(*stages)
    return ParallelModel(mesh, whole, stages, dtype=run.training.dtype)


def parallelize(model: Any, mesh: Mesh, run: Run) -> None:
    """Cut one stage, still without memory: its matrices, its experts; then what saves memory and time; then its shards.

    A later one sees what the earlier have made: FSDP shares out what tensor and expert parallelism have left of a
    weight, and compiles nothing but gathers what the compiled layer reads.
    """
    if mesh.size("expert") > 1:
        apply_expert(model, mesh)
    apply_memory(model, run.training)
    if mesh.size("loss") > 1:
        apply_shard(model, mesh, dtype=run.training.dtype)


def apply_memory(model: Any, training: config.Training) -> None:
    """What one process uses too."""


def check_rows(training: config.Training, mesh: Mesh) -> None:
    """Refuse rows that cannot be dealt out.

    Errors: ValueError naming numbers that can.
    """
    ranks, rows = mesh.size("data"), training.global_batch_size
    named = f"replicate {mesh.size('replicate')} x shard {mesh.size('shard')}"
    if rows % ranks:
        raise ValueError(
            f"training.global-batch-size {rows} is not divisible by {named} = {ranks}, the processes with rows of "
            f"their own; use {rows // ranks * ranks or ranks} or {(rows // ranks + 1) * ranks}"
        )
    if rows // ranks % training.micro_batch_size:
        raise ValueError(
            f"each of {named} = {ranks} processes has {rows // ranks} rows a step, not divisible by "
            f"training.micro-batch-size {training.micro_batch_size}; sizes that divide it: {divisors(rows // ranks)}"
        )
