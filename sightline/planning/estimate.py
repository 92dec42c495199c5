"""Estimate of a run on a mesh: memory and communication of each rank, pipeline bubble, FLOPs.

Parameters are counted by applying every parallelism to the model on the meta device, for one rank of a fake process
group after the other, so their counts are exact. Activations and communication are estimates; see `activation_memory`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from sightline.config import OPTIMIZER_STATE, Run, TrainingConfig
from sightline.layers.base import Role, attention_layers, parameter_info
from sightline.layers.loss import CHUNK_SIZE
from sightline.models import build_skeleton
from sightline.models.decoder import Decoder
from sightline.parallel.apply import parallelize
from sightline.parallel.checks import check_run
from sightline.parallel.mesh import Mesh
from sightline.parallel.patch import AXES
from sightline.parallel.pipeline_stages import build_local_stages, stages_of
from sightline.parallel.recompute import apply_recompute
from sightline.parallel.redistribute import local_part
from sightline.parallel.shard import layers_of
from sightline.parallel.tensor import apply_tensor
from sightline.planning.activation_memory import ActivationMemory, TraceCache, trace
from sightline.planning.timeline import Timeline, timeline
from sightline.planning.torch_private import fake_process_group

ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE = "all-gather parameters", "reduce-scatter gradients", "all-reduce gradients"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank. Parameters, gradients and optimizer state are exact, the rest is estimated."""

    parameters: int
    gradients: int
    optimizer_state: int
    unsharded_parameters: float
    """All-gathered parameters of the current and the next layer, and of modules outside the layers."""
    activations: float
    """Activations saved for the backward, summed over the micro-batches in flight."""
    workspace: float
    """Peak of a layer's backward in addition to that, with its unsharded gradients; or the logits, if they are more."""
    accumulates: bool
    """Whether gradients of earlier micro-batches are allocated during a forward. If not, gradients are allocated during
    the backward, while activations are freed."""

    @property
    def state(self) -> int:
        """Memory that is allocated throughout a run."""
        return self.parameters + self.gradients + self.optimizer_state

    @property
    def total(self) -> float:
        """Peak memory of the rank."""
        temporary = self.activations + self.workspace
        if self.accumulates:
            return self.state + self.unsharded_parameters + temporary
        return self.state - self.gradients + self.unsharded_parameters + max(self.gradients, temporary)


@dataclass(frozen=True, kw_only=True)
class RankEstimate:
    """One rank of a run; `traffic` is the bytes that it receives per optimizer step, by kind."""

    rank: int
    layers: int
    parameters: int
    memory: Memory
    traffic: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A run on a mesh.

    ranks         the first rank of each pipeline rank, which needs most memory: it is first along all other axes
    parameters    number of parameters of the full model
    microbatches  micro-batches per optimizer step, of each data-parallel rank
    matmul_flops  forward and backward FLOPs per step of all ranks, without attention scores
    causal_flops  FLOPs of the attention scores if each row is one causal document: an upper bound
    key_bytes     bytes per token that ranks of `context` exchange, summed over the layers of each mask, by mask name
    """

    mesh: Mesh
    ranks: list[RankEstimate]
    parameters: int
    microbatches: int
    timeline: Timeline
    matmul_flops: float
    causal_flops: float
    key_bytes: dict[str, float]

    @property
    def largest(self) -> RankEstimate:
        """The rank that needs most memory."""
        return max(self.ranks, key=lambda rank: rank.memory.total)


def estimate(run: Run, world: int) -> Estimate:
    """Estimate memory, communication and FLOPs of `run` on `world` ranks: GPUs, unless `training.device` is cpu.

    Raises:
        ValueError: if training would reject the run; see `check_run`.
    """
    check_run(run, world, torch.device("cpu" if run.training.device == "cpu" else "cuda"))
    parallel = replace(run.parallel, offload=False)  # offload moves the shards but does not change their size
    training = replace(run.training, compile=False)
    full_model = build_skeleton(run.model)
    with fake_process_group(world, 0):
        mesh = Mesh(parallel, torch.device("cpu"))
    pipeline_size = mesh.size("pipeline")
    rows = training.global_batch_size // mesh.size("data")
    training = replace(training, micro_batch_size=training.rows_per_forward(rows))
    run = replace(run, parallel=parallel, training=training)
    microbatches = rows // training.micro_batch_size
    times = timeline(mesh.parallel, microbatches) if pipeline_size > 1 else Timeline(0.0, [{0: 1}])
    ranks = []
    cache: TraceCache = {}
    key_bytes: dict[str, float] = {}
    for pipeline_rank in range(pipeline_size):
        with fake_process_group(world, pipeline_rank * (world // pipeline_size)):
            in_flight = times.in_flight[pipeline_rank]
            ranks.append(_estimate_rank(run, full_model, microbatches, in_flight, cache, key_bytes))
    pairs = training.sequence_length * (training.sequence_length + 1) / 2 * training.global_batch_size
    return Estimate(
        mesh=mesh,
        ranks=ranks,
        parameters=sum(p.numel() for p in full_model.parameters()),
        microbatches=microbatches,
        timeline=times,
        matmul_flops=full_model.flops_per_token() * training.global_batch_size * training.sequence_length,
        causal_flops=pairs * sum(layer.flops_per_pair() for layer in attention_layers(full_model)),
        key_bytes=key_bytes,
    )


def _estimate_rank(
    run: Run,
    full_model: Decoder,
    microbatches: int,
    in_flight: dict[int, int],
    cache: TraceCache,
    key_bytes: dict[str, float],
) -> RankEstimate:
    """Estimate the current rank of the fake process group.

    in_flight  micro-batches in flight in each stage of the rank
    key_bytes  see `Estimate`, for the ranks so far; those of this rank are added
    """
    mesh, training = Mesh(run.parallel, torch.device("cpu")), run.training
    stages = build_local_stages(full_model, mesh)
    traced = [_trace_stage(training, mesh, deepcopy(stage), cache) for stage in stages]
    for stage in stages:
        parallelize(stage, mesh, training)
    tokens = training.micro_batch_size * training.sequence_length / mesh.size("context")
    stage_indices = stages_of(mesh.parallel, mesh.index("pipeline")) if mesh.size("pipeline") > 1 else [0]
    parameters = [p for stage in stages for p in stage.parameters()]
    parameter_bytes = sum(local_part(p).numel() * p.element_size() for p in parameters)
    traced_layers = [layer for layers in traced for layer in layers.values()]
    memory = Memory(
        parameters=parameter_bytes,
        gradients=parameter_bytes,
        optimizer_state=sum(_optimizer_state(stage, run.optimizer.name) for stage in stages),
        unsharded_parameters=sum(_unsharded_parameters(stage, mesh, training.dtype) for stage in stages),
        activations=sum(
            in_flight[index]
            * (sum(layer.saved for layer in layers.values()) + _saved_outside_layers(stage, training, mesh, tokens))
            for index, layers, stage in zip(stage_indices, traced, stages, strict=True)
        ),
        accumulates=microbatches > 1,
        workspace=max(
            *(layer.workspace for layer in traced_layers), *(_logits(stage, mesh, tokens) for stage in stages)
        ),
    )
    for stage, layers in zip(stages, traced, strict=True):
        for name, layer in layers.items():
            mask = str(stage.layers[name].mask_name)
            key_bytes[mask] = key_bytes.get(mask, 0.0) + layer.context_shared / tokens
    return RankEstimate(
        rank=mesh.rank,
        layers=len(traced_layers),
        parameters=sum(local_part(p).numel() for p in parameters),
        memory=memory,
        traffic=_traffic(training.dtype, mesh, stages, traced_layers, tokens, microbatches),
    )


def _trace_stage(
    training: TrainingConfig, mesh: Mesh, stage: Decoder, cache: TraceCache
) -> dict[str, ActivationMemory]:
    apply_tensor(stage, mesh)
    apply_recompute(stage, training)
    shape = training.micro_batch_size, training.sequence_length // mesh.size("context")
    return trace(stage, mesh, shape, training.dtype, cache)


def _optimizer_state(stage: nn.Module, optimizer: str) -> int:
    """Bytes of the optimizer state on this rank."""
    of_matrix, of_other = OPTIMIZER_STATE[optimizer]
    return sum(
        (of_matrix if role is Role.MATRIX else of_other) * local_part(p).numel() * p.element_size()
        for _, p, role in parameter_info(stage)
    )


def _unsharded_numel(parameter: torch.Tensor) -> int:
    """Elements of a parameter after the all-gather of FSDP; tensor and expert parallelism still shard it."""
    count = parameter.numel()
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        for name, placement, size in zip(names, parameter.placements, parameter.device_mesh.shape, strict=True):
            if name in AXES and isinstance(placement, Shard):
                count //= size
    return count


def _element_size(dtype: str) -> int:
    """Bytes of a number in forward and backward."""
    return 2 if dtype == "bfloat16" else 4


def _unsharded_parameters(stage: nn.Module, mesh: Mesh, dtype: str) -> float:
    """Bytes of the parameters that FSDP has all-gathered at the peak; 0 without FSDP.

    With a pipeline all parameters; otherwise those of the two largest layers and of the modules outside the layers.
    """
    if mesh.size("loss") == 1:
        return 0.0
    in_layers = [sum(_unsharded_numel(p) for p in layer.parameters()) for layer in layers_of(stage)]
    outside = sum(_unsharded_numel(p) for p in stage.parameters()) - sum(in_layers)
    if mesh.size("pipeline") == 1:
        in_layers = sorted(in_layers)[-2:]
    return float(_element_size(dtype) * (outside + sum(in_layers)))


def _saved_outside_layers(stage: Decoder, training: TrainingConfig, mesh: Mesh, tokens: float) -> float:
    """Bytes that embedding, final norm and loss save for the backward.

    These are the embedded tokens, the normalized hidden states, and the gradients that the loss computes in its
    forward, of the hidden states and of the output projection. Tensor parallelism adds the all-gathered output of the
    last layer.
    """
    config = stage.config
    hidden = tokens * config.hidden_size * (_element_size(training.dtype) if mesh.size("loss") > 1 else 4)
    saved = hidden if stage.embedding is not None else 0.0
    if stage.norm is not None:
        copies = 2 if mesh.size("tensor") == 1 else 3
        saved += copies * hidden + 4 * config.hidden_size * config.vocab_size / mesh.size("tensor")
    return saved


def _logits(stage: Decoder, mesh: Mesh, tokens: float) -> float:
    """Bytes of the logits of one chunk of the loss."""
    return 0.0 if stage.norm is None else 4 * min(CHUNK_SIZE, tokens) * stage.config.vocab_size / mesh.size("tensor")


def _traffic(
    dtype: str, mesh: Mesh, stages: list[Decoder], layers: list[ActivationMemory], tokens: float, microbatches: int
) -> dict[str, float]:
    """Bytes that this rank receives per optimizer step, by kind, without kinds of 0 bytes."""
    element_size = _element_size(dtype)
    traffic = dict.fromkeys((ALL_GATHER, REDUCE_SCATTER, ALL_REDUCE), 0.0)
    if mesh.size("loss") > 1:
        _add_fsdp_traffic(traffic, mesh, stages, element_size, microbatches)
    hidden = tokens * stages[0].config.hidden_size * element_size
    tensor = mesh.size("tensor")
    if tensor > 1:
        outside = sum(1 + (stage.embedding is not None) + (stage.norm is not None) for stage in stages)
        in_layers = sum(layer.tensor_received for layer in layers)
        traffic["tensor parallel hidden states"] = microbatches * (
            in_layers + outside * 2 * hidden * (tensor - 1) / tensor
        )
    pipeline = mesh.size("pipeline")
    if pipeline > 1:
        local = stages_of(mesh.parallel, mesh.index("pipeline"))
        last = max(max(stages_of(mesh.parallel, rank)) for rank in range(pipeline))
        receives = sum(n > 0 and n - 1 not in local for n in local) + sum(
            n < last and n + 1 not in local for n in local
        )
        traffic["pipeline send/recv"] = microbatches * receives * hidden
    expert = mesh.size("expert")
    if expert > 1:  # dispatch and combine, forward and backward
        routed = sum(layer.routed_tokens for layer in layers)
        traffic["expert all-to-all, even load"] = microbatches * 4 * routed * (expert - 1) / expert
    context = mesh.size("context")
    if context > 1:  # the keys of all other ranks, and the gradients of local keys from all other ranks
        shared = sum(layer.context_shared for layer in layers)
        traffic["context exchange, at most"] = microbatches * 2 * shared * (context - 1)
    return {kind: size for kind, size in traffic.items() if size}


def _add_fsdp_traffic(
    traffic: dict[str, float], mesh: Mesh, stages: list[Decoder], element_size: int, microbatches: int
) -> None:
    """Add the collectives of FSDP to `traffic`.

    Parameters of layers are all-gathered in each forward and each backward, other parameters in each forward; with a
    pipeline, all parameters once per step. Gradients are reduced once per step, in float32.
    """
    replicas = mesh.size("replicate")
    for stage in stages:
        in_layers = {id(p) for layer in layers_of(stage) for p in layer.parameters()}
        for p in stage.parameters():
            numel, local_numel = _unsharded_numel(p), local_part(p).numel()
            gathers = 1 if mesh.size("pipeline") > 1 else microbatches * (2 if id(p) in in_layers else 1)
            traffic[ALL_GATHER] += element_size * gathers * max(0, numel - local_numel)
            traffic[REDUCE_SCATTER] += 4 * max(0, numel - local_numel)
            traffic[ALL_REDUCE] += 4 * local_numel * 2 * (replicas - 1) / replicas
