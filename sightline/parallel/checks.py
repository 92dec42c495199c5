"""Whether a run can be trained on a number of ranks, checked before anything is built or read."""

from __future__ import annotations

import torch

from sightline.config import Run, TrainingConfig
from sightline.models import build_skeleton
from sightline.models.decoder import Decoder
from sightline.numbers import divisors
from sightline.parallel.context.apply import check_context
from sightline.parallel.expert import check_expert
from sightline.parallel.mesh import Degrees
from sightline.parallel.pipeline_stages import check_pipeline, count_microbatches
from sightline.parallel.tensor import check_tensor


def check_run(run: Run, world: int, device: torch.device) -> str:
    """Check that model, batch and options of `run` fit each other and a mesh of `world` ranks.

    Returns the first attention backend that supports the layers, by name; with other masks `auto` may use another.

    Training and `sightline plan` both call this first, so they reject the same runs with the same message.

    device  type of the devices; this machine need not have one

    Raises:
        ValueError: if they do not fit; the message names values that do.
    """
    degrees = Degrees(run.parallel, world)
    check_rows(run.training, degrees)
    model = build_skeleton(run.model, attention_backend=run.attention.backend)
    check_pipeline(model, degrees.parallel)
    check_context(model, degrees, run.training.sequence_length)
    check_tensor(model, degrees, run.training.sequence_length)
    check_expert(model, degrees)
    check_offload(run, degrees, device)
    return check_kernels(model, run, degrees, device)


def check_kernels(model: Decoder, run: Run, degrees: Degrees, device: torch.device) -> str:
    """Check that the attention backend of the model supports the training and the sample text at its end; return it.

    Raises:
        ValueError: if it does not; the message lists the backends that do.
    """
    dtype = getattr(torch, run.training.dtype)
    backend = model.check_backend(device, dtype, training=True, same_tokens=degrees.size("context") == 1)
    if run.logging.sample_tokens:
        try:
            model.check_backend(device, dtype, training=False, same_tokens=False)
        except ValueError as error:
            raise ValueError(
                f"{error}; or use --logging.sample-tokens 0: the sample text is generated token by token"
            ) from error
    return backend


def check_rows(training: TrainingConfig, degrees: Degrees) -> None:
    """Check that the data ranks can share the rows of a step evenly, in equal micro-batches.

    Raises:
        ValueError: if they cannot; the message names the nearest valid sizes.
    """
    ranks, rows = degrees.size("data"), training.global_batch_size
    named = f"replicate {degrees.size('replicate')} x shard {degrees.size('shard')}"
    if rows % ranks:
        raise ValueError(
            f"training.global-batch-size {rows} is not divisible by {named} = {ranks}, the number of data "
            f"ranks; use {f'{rows // ranks * ranks} or ' if rows > ranks else ''}{(rows // ranks + 1) * ranks}"
        )
    if degrees.size("pipeline") > 1:
        count_microbatches(degrees.parallel, training, rows // ranks)
    elif rows // ranks % training.rows_per_forward(rows // ranks):
        raise ValueError(
            f"each of {named} = {ranks} data ranks has {rows // ranks} rows per step, which is not divisible by "
            f"training.micro-batch-size {training.micro_batch_size}; sizes that divide it: {divisors(rows // ranks)}"
        )


def check_offload(run: Run, degrees: Degrees, device: torch.device) -> None:
    """Check that parallel.offload has an effect, and an optimizer that supports it.

    Raises:
        ValueError: if the device is the CPU, FSDP shards no weights on this mesh, or the optimizer is Muon.
    """
    if not run.parallel.offload:
        return
    if device.type == "cpu" or degrees.size("loss") == 1:
        reason = "are on the CPU already" if device.type == "cpu" else "are not sharded by this mesh"
        raise ValueError(
            f"parallel.offload keeps sharded weights in CPU memory, but the weights {reason}; use "
            "--parallel.no-offload, or several GPUs with shard, replicate or context above 1"
        )
    if run.optimizer.name == "muon":
        raise ValueError(
            f"optimizer.name muon multiplies matrices on the {device.type} devices, but parallel.offload keeps them in "
            "CPU memory; use --parallel.no-offload, or --optimizer.name adamw"
        )
