"""Apply context parallelism to a model, and shard the inputs of a batch along the sequence."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sightline.layers import routers_of
from sightline.masks import named_masks
from sightline.models.decoder import Decoder
from sightline.numbers import divisors, nearest
from sightline.parallel.context.exchange import ContextExchange
from sightline.parallel.context.plan import plan_context
from sightline.parallel.mesh import Degrees, Mesh
from sightline.parallel.patch import replace_attribute


def apply_context(model: Decoder, mesh: Mesh) -> None:
    """Let the layers receive the keys that local queries attend to from the other ranks of `context`, and sum the loss
    over these ranks.

    The auxiliary losses of routers multiply the scores of local tokens by the expert counts of full rows, so that the
    gradients of all ranks add up to those of a single process.
    """
    if mesh.size("context") == 1:
        return
    replace_attribute(model, "exchanges", ContextExchange(mesh.group("context")))
    replace_attribute(model, "context_group", mesh.group("context"))

    def full_row_counts(counts: Tensor) -> Tensor:
        return mesh.all_reduce(counts.clone(), "context")

    for router in routers_of(model).values():
        replace_attribute(router, "full_row_counts", full_row_counts)


def shard_inputs(inputs: dict[str, Any], model: Any, mesh: Mesh) -> dict[str, Any]:
    """Return the inputs of the model's forward for this rank's tokens, from those for full rows. All are on the CPU.

    Tokens, labels, positions and the model's `per_token_inputs` become [B, S / degree]; decoder masks become
    ContextShards. Other inputs, such as the images of the rows, stay full: every rank computes them but uses them for
    its local tokens only, so their gradients add up over the ranks like all others.

    Raises:
        ValueError: if the ranks of `context` cannot share the rows.
    """
    degree, rank = mesh.size("context"), mesh.index("context")
    per_token = model.per_token_inputs(inputs)
    if degree == 1:
        return {**inputs, **per_token}
    masks = named_masks(inputs["attention_masks"])
    decoder_names = {str(layer.mask_name) for layer in model.layers.values()}
    decoder_masks = {name: mask for name, mask in masks.items() if name in decoder_names}
    layers = {name: model.attention_shape(name)[0] for name in decoder_masks}
    parallel = mesh.parallel
    plan = plan_context(decoder_masks, degree, parallel.context_order, layers=layers, balance=parallel.context_balance)
    full_rows = model.context_parallel_heads is not None
    shards = {name: plan.shard(rank, name, full_rows=full_rows) for name in decoder_masks}
    local_tokens = plan.queries(rank)
    per_token = {name: inputs[name] for name in ("tokens", "labels", "positions") if name in inputs} | per_token
    loss_inputs = {name: value.gather(1, local_tokens) for name, value in inputs.get("loss_inputs", {}).items()}
    return {
        **inputs,
        **{name: value.gather(1, local_tokens) for name, value in per_token.items()},
        **({"loss_inputs": loss_inputs} if loss_inputs else {}),
        "attention_masks": {**masks, **shards},
    }


def check_context(model: Any, degrees: Degrees, length: int) -> None:
    """Check that the ranks of `context` can share rows of `length` tokens and the heads of recurrent layers.

    Raises:
        ValueError: if they cannot; the message names lengths and degrees that work.
    """
    degree = degrees.size("context")
    if length % degree:
        above = (length // degree + 1) * degree
        lengths = f"{above - degree} or {above}" if length > degree else f"{above}"
        raise ValueError(
            f"training.sequence-length {length} is not divisible by parallel.context {degree}, the number of ranks "
            f"that share a row; use --training.sequence-length {lengths}, or parallel.context "
            f"{nearest(degree, divisors(length))}"
        )
    if model.context_parallel_heads is None:
        return
    heads = model.context_parallel_heads // degrees.size("tensor")
    if heads % degree:
        raise ValueError(
            f"parallel.context {degree} does not divide the {heads} key heads that each rank has with parallel.tensor "
            f"{degrees.size('tensor')}: recurrent layers compute full rows, so context parallelism shards their heads; "
            f"use parallel.context {nearest(degree, divisors(heads))}"
        )
