"""Context parallelism as it is applied to a model, and a batch's whole rows cut to the tokens of one process."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sightline.layers import routers_of
from sightline.masks import named_masks
from sightline.models.decoder import Decoder
from sightline.numbers import divisors, nearest
from sightline.parallel.context.exchange import ContextExchange
from sightline.parallel.context.plan import plan_context
from sightline.parallel.mesh import Mesh
from sightline.parallel.patch import replace_attribute


def apply_context(model: Decoder, mesh: Mesh) -> None:
    """Let the layers fetch the keys that their tokens see from the processes of `context`, and the loss sum over them.

    Routers' auxiliary losses weigh the scores of this process's tokens by the choices of the whole rows, so that their
    gradients add up to what one process would compute.
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
    """From what the model's forward takes of whole rows, on the CPU, to what it takes of this process's tokens.

    Tokens, labels, positions and what else the model says of each token become [B, S / degree], its masks of tokens
    become ContextShards. All else, as the images of the rows, stays whole: every process computes it, for its own
    tokens only, so its gradients add up over the processes like all others.

    Errors: ValueError for rows that so many processes cannot share.
    """
    degree, rank = mesh.size("context"), mesh.index("context")
    facts = model.per_token_inputs(inputs)
    if degree == 1:
        return {**inputs, **facts}
    masks = named_masks(inputs["attention_masks"])
    of_tokens = {str(layer.mask_name) for layer in model.layers.values()}
    planned = {name: mask for name, mask in masks.items() if name in of_tokens}
    layers = {name: model.attention_shape(name)[0] for name in planned}
    plan = plan_context(planned, degree, mesh.parallel.context_order, layers=layers)
    full_rows = model.context_parallel_heads is not None
    shards = {name: plan.shard(rank, name, full_rows=full_rows) for name in planned}
    owned = plan.queries(rank)
    of_token = {name: inputs[name] for name in ("tokens", "labels", "positions") if name in inputs}
    loss_inputs = {name: value.gather(1, owned) for name, value in inputs.get("loss_inputs", {}).items()}
    return {
        **inputs,
        **{name: value.gather(1, owned) for name, value in (of_token | facts).items()},
        **({"loss_inputs": loss_inputs} if loss_inputs else {}),
        "attention_masks": {**masks, **shards},
    }


def check_context(model: Any, mesh: Mesh, length: int) -> None:
    """Refuse rows of `length` tokens that the processes of `context` cannot share, and a model whose layers cannot."""
    degree = mesh.size("context")
    if length % degree:
        above = (length // degree + 1) * degree
        lengths = f"{above - degree} or {above}" if length > degree else f"{above}"
        raise ValueError(
            f"training.sequence-length {length} is not divisible by parallel.context {degree}, as many as share "
            f"a row; use --training.sequence-length {lengths}, or parallel.context {nearest(degree, divisors(length))}"
        )
    if model.context_parallel_heads is None:
        return
    heads = model.context_parallel_heads // mesh.size("tensor")
    if heads % degree:
        raise ValueError(
            f"parallel.context {degree} does not divide the {heads} key heads that parallel.tensor "
            f"{mesh.size('tensor')} leaves each process: layers with a memory walk along whole rows, and it is "
            f"their heads that are shared out; use parallel.context {nearest(degree, divisors(heads))}"
        )
