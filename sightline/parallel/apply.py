"""Applies all parallelisms to a model, in a fixed order."""

from __future__ import annotations

from typing import Any

import torch

from sightline import config
from sightline.layers import get_loss
from sightline.models import build_skeleton, init_model_weights
from sightline.models.decoder import Decoder
from sightline.numbers import divisors
from sightline.parallel.compile import apply_compile
from sightline.parallel.context.apply import apply_context, check_context
from sightline.parallel.expert import apply_expert
from sightline.parallel.mesh import Mesh
from sightline.parallel.parallel_model import ParallelModel
from sightline.parallel.pipeline import PipelinedModel
from sightline.parallel.pipeline_stages import build_local_stages, count_microbatches
from sightline.parallel.recompute import apply_recompute
from sightline.parallel.shard import apply_shard
from sightline.parallel.tensor import apply_tensor


def build_parallel(
    model: Any, training: config.TrainingConfig, mesh: Mesh, *, attention_backend: str = "auto"
) -> ParallelModel:
    """Return this rank's part of the model of a config, with fresh weights that are the same on every mesh.

    Raises:
        ValueError: if a degree does not divide what it shards; the message names the valid degrees.
    """
    check_offload(mesh)
    full_model: Decoder = build_skeleton(model, attention_backend=attention_backend)
    full_model.loss = get_loss(training.loss)
    full_model.check_backend(mesh.device, getattr(torch, training.dtype), training=True)
    check_context(full_model, mesh, training.sequence_length)
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


def check_offload(mesh: Mesh) -> None:
    """Check that parallel.offload has an effect.

    Raises:
        ValueError: if the device is the CPU, or if FSDP shards no weights on this mesh.
    """
    reason = "are on the CPU already" if mesh.device.type == "cpu" else "are not sharded by this mesh"
    if mesh.parallel.offload and (mesh.device.type == "cpu" or mesh.size("loss") == 1):
        raise ValueError(
            f"parallel.offload keeps sharded weights in CPU memory, but the weights {reason}; use "
            "--parallel.no-offload, or several GPUs with shard, replicate or context above 1"
        )


def check_rows(training: config.TrainingConfig, mesh: Mesh) -> None:
    """Check that the data ranks can share the rows of a step evenly, in equal micro-batches.

    Raises:
        ValueError: if they cannot; the message names the nearest valid sizes.
    """
    ranks, rows = mesh.size("data"), training.global_batch_size
    degrees = f"replicate {mesh.size('replicate')} x shard {mesh.size('shard')}"
    if rows % ranks:
        raise ValueError(
            f"training.global-batch-size {rows} is not divisible by {degrees} = {ranks}, the number of data "
            f"ranks; use {f'{rows // ranks * ranks} or ' if rows > ranks else ''}{(rows // ranks + 1) * ranks}"
        )
    if mesh.size("pipeline") > 1:
        count_microbatches(mesh.parallel, training, rows // ranks)
    elif rows // ranks % training.rows_per_forward(rows // ranks):
        raise ValueError(
            f"each of {degrees} = {ranks} data ranks has {rows // ranks} rows per step, which is not divisible by "
            f"training.micro-batch-size {training.micro_batch_size}; sizes that divide it: {divisors(rows // ranks)}"
        )
