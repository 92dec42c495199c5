"""A batch's whole rows, cut to the tokens of one of the processes that share them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sightline.masks import AttentionMask
from sightline.models.decoder import Masks
from sightline.parallel.context.mask import ContextMask, WholeRows
from sightline.parallel.context.plan import ContextPlan, plan_context
from sightline.parallel.mesh import Mesh, divisors, nearest


def split_context(inputs: dict[str, Any], model: Any, mesh: Mesh) -> dict[str, Any]:
    """From what the model's forward takes of whole rows, on the CPU, to what it takes of this process's tokens.

    Tokens, labels, positions and what the model says of each token become [B, S / degree]; its masks of tokens become
    ContextMasks. All else, as the images of the rows, stays whole: it is computed on every process, and as each of them
    uses it for its own tokens only, gradients add up over the processes as those of all weights do.

    Errors: ValueError for rows that cannot be shared by so many processes.
    """
    degree, rank = mesh.size("context"), mesh.index("context")
    if degree == 1:
        return inputs
    masks: Masks = inputs["attention_masks"]
    named = masks if isinstance(masks, dict) else {"attention": masks}
    of_tokens = {str(layer.mask_name) for layer in model.layers.values()}
    planned = {name: mask for name, mask in named.items() if name in of_tokens}
    layers = {name: model.attention_shape(name)[0] for name in planned}
    plan = plan_context(planned, degree, mesh.parallel.context_order, layers=layers)
    views = {name: _view(plan, name, rank, mesh, model.row_heads is not None) for name in planned}
    own = plan.queries(rank)
    of_token = {name: inputs[name] for name in ("tokens", "labels", "positions") if inputs.get(name) is not None}
    of_token |= model.token_facts(inputs)
    return {
        **inputs,
        **{name: value.gather(1, own) for name, value in of_token.items()},
        "attention_masks": {**named, **views} if isinstance(masks, dict) else views["attention"],
    }


def _view(plan: ContextPlan, name: str, rank: int, mesh: Mesh, walks_rows: bool) -> ContextMask:
    view = plan.view(rank, name)
    rows = None
    if walks_rows:
        owned = torch.stack([plan.queries(peer) for peer in range(plan.degree)], dim=1)
        rows = WholeRows(plan.masks[name], owned)
    mask: AttentionMask = view.mask
    return ContextMask(
        mask.start, mask.stop, mask.key_length, view.send, view.receive, mesh.group("context"), rows
    )


def check_context(model: Any, mesh: Mesh, length: int) -> None:
    """Refuse rows of `length` tokens, and a model whose layers walk along whole rows, that the processes cannot share.

    Errors: ValueError naming degrees that can.
    """
    degree = mesh.size("context")
    if length % degree:
        raise ValueError(
            f"training.sequence-length {length} is not divisible by parallel.context {degree}, the processes that share "
            f"a row; use --training.sequence-length {length // degree * degree or degree} or "
            f"{(length // degree + 1) * degree}, or --parallel.context {nearest(degree, divisors(length))}"
        )
    if model.row_heads is None:
        return
    heads = model.row_heads // mesh.size("tensor")
    if heads % degree:
        each = f" that tensor parallelism leaves of {model.row_heads}" if mesh.size("tensor") > 1 else ""
        raise ValueError(
            f"parallel.context {degree} does not divide the {heads} heads{each} of the layers that walk along whole "
            f"rows: each process takes some heads of all tokens; use --parallel.context "
            f"{nearest(degree, divisors(heads))}"
        )
