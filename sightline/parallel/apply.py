"""Applies all parallelisms to a model, in a fixed order."""

from __future__ import annotations

from typing import Any

from sightline import config
from sightline.layers import get_loss
from sightline.models import build_skeleton, init_model_weights
from sightline.models.decoder import Decoder
from sightline.parallel.compile import apply_compile
from sightline.parallel.context.apply import apply_context
from sightline.parallel.expert import apply_expert
from sightline.parallel.mesh import Mesh
from sightline.parallel.parallel_model import ParallelModel
from sightline.parallel.pipeline import PipelinedModel
from sightline.parallel.pipeline_stages import build_local_stages
from sightline.parallel.recompute import apply_recompute
from sightline.parallel.shard import apply_shard
from sightline.parallel.tensor import apply_tensor


def build_parallel(
    model: Any, training: config.TrainingConfig, mesh: Mesh, *, attention_backend: str = "auto"
) -> ParallelModel:
    """Return this rank's part of the model of a config, with fresh weights that are the same on every mesh.

    `check_run` has checked that the mesh and the model fit.
    """
    full_model: Decoder = build_skeleton(model, attention_backend=attention_backend)
    full_model.loss = get_loss(training.loss)
    stages = [full_model] if mesh.world == 1 else build_local_stages(full_model, mesh)
    for stage in stages:
        parallelize(stage, mesh, training)
        stage.to_empty(device="cpu" if mesh.parallel.offload else mesh.device)
    init_model_weights(*stages)
    if mesh.size("pipeline") == 1:
        return ParallelModel(mesh, full_model, stages, dtype=training.dtype)
    rows = training.rows_per_forward(training.global_batch_size // mesh.size("data"))
    return PipelinedModel(mesh, full_model, stages, dtype=training.dtype, micro_batch_size=rows)


def parallelize(model: Decoder, mesh: Mesh, training: config.TrainingConfig) -> None:
    """Apply all parallelisms except the pipeline to one stage of a model on the meta device, in place.

    The order matters: expert parallelism shards the weights that tensor parallelism has sharded, torch.compile compiles
    a layer together with its recomputation, and FSDP shards what is left of each weight.
    """
    apply_tensor(model, mesh)
    apply_expert(model, mesh)
    apply_context(model, mesh)
    apply_recompute(model, training)
    if training.compile:
        apply_compile(model)
    if mesh.size("loss") > 1:
        apply_shard(model, mesh, dtype=training.dtype)
