"""What a run will need on a mesh, by calculation: memory and communication of each process, bubble, arithmetic.

Parameters are counted by applying every parallelism to a model on the meta device as one rank after the other of a
fake job would, so the counts are those of training, to the byte. Activations and traffic are estimates; see
`activation_memory`.
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
from sightline.parallel.apply import check_rows, parallelize
from sightline.parallel.context.apply import check_context
from sightline.parallel.mesh import Mesh
from sightline.parallel.patch import AXES
from sightline.parallel.pipeline_stages import build_local_stages, stages_of
from sightline.parallel.recompute import apply_recompute
from sightline.parallel.redistribute import local_part
from sightline.parallel.shard import layers_of
from sightline.parallel.tensor import apply_tensor
from sightline.planning.activation_memory import ActivationMemory, Kinds, trace
from sightline.planning.timeline import Timeline, timeline
from sightline.planning.torch_private import fake_process_group


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one process. The first three are exact."""

    weights: int
    gradients: int
    optimizer_state: int
    unsharded_weights: float
    """The weights of the layer at work and of the next one, whole, and those that belong to no layer."""
    activations: float
    """What waits for the backward, of as many microbatches as are under way."""
    workspace: float
    """What a layer's backward needs on top of that, its gradients before they are shared out among them, or the loss
    for its logits."""
    accumulates: bool
    """Whether the gradients of a forward meet those of the ones before it. Else they grow while activations go."""

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer_state

    @property
    def total(self) -> float:
        """What the process holds at its height."""
        passing = self.activations + self.workspace
        if self.accumulates:
            return self.state + self.unsharded_weights + passing
        return self.state - self.gradients + self.unsharded_weights + max(self.gradients, passing)


@dataclass(frozen=True, kw_only=True)
class ProcessEstimate:
    """One process of a run; `traffic` is the bytes it receives in an optimizer step, by kind."""

    rank: int
    layers: int
    parameters: int
    memory: Memory
    traffic: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A run on a mesh.

    processes    of each pipeline process the one that holds most: the first along all other axes. Without a pipeline
                 it is rank 0
    parameters   of the whole model
    microbatches forwards of a process, or microbatches of its pipeline, in a step
    matmul_flops of all processes in a step, forward and backward, attention's scores left out
    causal_flops those scores, were every row one causal document: the most there can be
    """

    mesh: Mesh
    processes: list[ProcessEstimate]
    parameters: int
    microbatches: int
    timeline: Timeline
    matmul_flops: float
    causal_flops: float
    key_bytes: dict[str, float]

    @property
    def largest(self) -> ProcessEstimate:
        """The process that needs most memory."""
        return max(self.processes, key=lambda process: process.memory.total)


def estimate(run: Run, world: int) -> Estimate:
    """What `run` needs on `world` processes.

    Errors: ValueError for what training would refuse: degrees that do not fit the processes, the model or the batch.
    """
    parallel = replace(run.parallel, offload=False)  # where the shards lie does not change their size
    training = replace(run.training, compile=False)
    run = replace(run, parallel=parallel, training=training)
    full_model = build_skeleton(run.model)
    with fake_process_group(world, 0):
        mesh = Mesh(parallel, torch.device("cpu"))
        check_context(full_model, mesh, training.sequence_length)
        check_rows(training, mesh)
    stages = mesh.size("pipeline")
    rows = training.global_batch_size // mesh.size("data")
    microbatches = rows // training.micro_batch_size
    times = timeline(mesh.parallel, microbatches) if stages > 1 else Timeline(0.0, [{0: 1}])
    processes = []
    found: Kinds = {}
    key_bytes: dict[str, float] = {}
    for process in range(stages):
        with fake_process_group(world, process * (world // stages)):
            processes.append(_on_this_rank(run, full_model, microbatches, times.in_flight[process], found, key_bytes))
    pairs = training.sequence_length * (training.sequence_length + 1) / 2 * training.global_batch_size
    return Estimate(
        mesh=mesh,
        processes=processes,
        parameters=sum(p.numel() for p in full_model.parameters()),
        microbatches=microbatches,
        timeline=times,
        matmul_flops=full_model.flops_per_token() * training.global_batch_size * training.sequence_length,
        causal_flops=pairs * sum(layer.flops_per_pair() for layer in attention_layers(full_model)),
        key_bytes=key_bytes,
    )


def _on_this_rank(
    run: Run, full_model: Decoder, microbatches: int, held: dict[int, int], found: Kinds, key_bytes: dict[str, float]
) -> ProcessEstimate:
    """The process that this one pretends to be.

    key_bytes  by mask, of a token's keys in all layers of the processes so far; grows
    """
    mesh, training = Mesh(run.parallel, torch.device("cpu")), run.training
    skeletons = build_local_stages(full_model, mesh)
    traced = [_trace(training, mesh, deepcopy(stage), found) for stage in skeletons]
    for stage in skeletons:
        parallelize(stage, mesh, training)
    tokens = training.micro_batch_size * training.sequence_length / mesh.size("context")
    numbers = stages_of(mesh.parallel, mesh.index("pipeline")) if mesh.size("pipeline") > 1 else [0]
    parameters = [p for stage in skeletons for p in stage.parameters()]
    weights = sum(local_part(p).numel() * p.element_size() for p in parameters)
    traced_layers = [layer for layers in traced for layer in layers.values()]
    memory = Memory(
        weights=weights,
        gradients=weights,
        optimizer_state=sum(_optimizer_state(stage, run.optimizer.name) for stage in skeletons),
        unsharded_weights=sum(_gathered(stage, mesh, training.dtype) for stage in skeletons),
        activations=sum(
            held[number] * (sum(layer.saved for layer in layers.values()) + _ends_kept(stage, training, mesh, tokens))
            for number, layers, stage in zip(numbers, traced, skeletons, strict=True)
        ),
        accumulates=microbatches > 1,
        workspace=max(
            *(layer.workspace for layer in traced_layers), *(_logits(stage, mesh, tokens) for stage in skeletons)
        ),
    )
    for stage, layers in zip(skeletons, traced, strict=True):
        for name, layer in layers.items():
            mask = str(stage.layers[name].mask_name)
            key_bytes[mask] = key_bytes.get(mask, 0.0) + layer.keys / tokens
    return ProcessEstimate(
        rank=mesh.rank,
        layers=len(traced_layers),
        parameters=sum(local_part(p).numel() for p in parameters),
        memory=memory,
        traffic=_traffic(training.dtype, mesh, skeletons, traced_layers, tokens, microbatches),
    )


def _trace(training: TrainingConfig, mesh: Mesh, stage: Decoder, found: Kinds) -> dict[str, ActivationMemory]:
    apply_tensor(stage, mesh)
    apply_recompute(stage, training)
    shape = training.micro_batch_size, training.sequence_length // mesh.size("context")
    return trace(stage, mesh, shape, training.dtype, found)


def _optimizer_state(stage: nn.Module, optimizer: str) -> int:
    """Bytes of the optimizer's state on this process."""
    of_matrix, of_other = OPTIMIZER_STATE[optimizer]
    return sum(
        (of_matrix if role is Role.MATRIX else of_other) * local_part(p).numel() * p.element_size()
        for _, p, role in parameter_info(stage)
    )


def unsharded(parameter: torch.Tensor) -> int:
    """Elements of a parameter while its layer runs: cut by tensor and expert parallelism, gathered from shards."""
    count = parameter.numel()
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        for name, placement, size in zip(names, parameter.placements, parameter.device_mesh.shape, strict=True):
            if name in AXES and isinstance(placement, Shard):
                count //= size
    return count


def _width(dtype: str) -> int:
    """Bytes of a number in forward and backward."""
    return 2 if dtype == "bfloat16" else 4


def _gathered(stage: nn.Module, mesh: Mesh, dtype: str) -> float:
    """Bytes of whole weights that FSDP holds at its height: all of them under a pipeline, else two layers' and those of
    no layer. None where nothing is shared."""
    if mesh.size("loss") == 1:
        return 0.0
    of_layers = [sum(unsharded(p) for p in layer.parameters()) for layer in layers_of(stage)]
    outside = sum(unsharded(p) for p in stage.parameters()) - sum(of_layers)
    if mesh.size("pipeline") == 1:
        of_layers = sorted(of_layers)[-2:]
    return float(_width(dtype) * (outside + sum(of_layers)))


def _ends_kept(stage: Decoder, training: TrainingConfig, mesh: Mesh, tokens: float) -> float:
    """Bytes that embedding, norm and loss keep: the embedded tokens, the normed ones, and the gradients that the loss
    computes in its forward, of the tokens and of the vocabulary's weights. The layers' results are the layers', but for
    the rows that tensor parallelism gathers behind them."""
    config = stage.config
    hidden = tokens * config.hidden_size * (_width(training.dtype) if mesh.size("loss") > 1 else 4)
    kept = hidden if stage.embedding is not None else 0.0
    if stage.norm is not None:
        rows = 2 if mesh.size("tensor") == 1 else 3
        kept += rows * hidden + 4 * config.hidden_size * config.vocab_size / mesh.size("tensor")
    return kept


def _logits(stage: Decoder, mesh: Mesh, tokens: float) -> float:
    """Bytes of the logits that exist at a time."""
    return 0.0 if stage.norm is None else 4 * min(CHUNK_SIZE, tokens) * stage.config.vocab_size / mesh.size("tensor")


def _traffic(
    dtype: str, mesh: Mesh, stages: list[Decoder], layers: list[ActivationMemory], tokens: float, microbatches: int
) -> dict[str, float]:
    """Bytes that come to this process in a step, by kind; kinds without any are left out."""
    narrow = _width(dtype)
    traffic = dict.fromkeys(("weights gathered", "gradients scattered", "gradients of copies summed"), 0.0)
    if mesh.size("loss") > 1:
        _add_sharding(traffic, mesh, stages, narrow, microbatches)
    hidden = tokens * stages[0].config.hidden_size * narrow
    tensor = mesh.size("tensor")
    if tensor > 1:
        ends = sum(1 + (stage.embedding is not None) + (stage.norm is not None) for stage in stages)
        in_layers = sum(layer.tensor for layer in layers)
        traffic["tensor, between layers"] = microbatches * (in_layers + ends * 2 * hidden * (tensor - 1) / tensor)
    pipeline = mesh.size("pipeline")
    if pipeline > 1:
        mine = stages_of(mesh.parallel, mesh.index("pipeline"))
        last = max(max(stages_of(mesh.parallel, process)) for process in range(pipeline))
        borders = sum(n > 0 and n - 1 not in mine for n in mine) + sum(n < last and n + 1 not in mine for n in mine)
        traffic["pipeline, stage to stage"] = microbatches * borders * hidden
    expert = mesh.size("expert")
    if expert > 1:  # to the experts and back, forward and backward
        routed = sum(layer.routed_tokens for layer in layers)
        traffic["expert all-to-all, even load"] = microbatches * 4 * routed * (expert - 1) / expert
    context = mesh.size("context")
    if context > 1:  # all other processes' keys, and all other processes' gradients of one's own
        keys = sum(layer.keys for layer in layers)
        traffic["context exchange, at most"] = microbatches * 2 * keys * (context - 1)
    return {kind: size for kind, size in traffic.items() if size}


def _add_sharding(traffic: dict[str, float], mesh: Mesh, stages: list[Decoder], narrow: int, microbatches: int) -> None:
    """FSDP: a layer's weights come for each forward and each backward, those of no layer for each forward; under a
    pipeline all of them once. Gradients travel once a step, in float32."""
    copies = mesh.size("replicate")
    for stage in stages:
        in_layers = {id(p) for layer in layers_of(stage) for p in layer.parameters()}
        for p in stage.parameters():
            count, own = unsharded(p), local_part(p).numel()
            times = 1 if mesh.size("pipeline") > 1 else microbatches * (2 if id(p) in in_layers else 1)
            traffic["weights gathered"] += narrow * times * max(0, count - own)
            traffic["gradients scattered"] += 4 * max(0, count - own)
            traffic["gradients of copies summed"] += 4 * own * 2 * (copies - 1) / copies
