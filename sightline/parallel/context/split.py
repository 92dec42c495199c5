"""A batch's whole rows, cut to the tokens of one of the processes that share them."""

from __future__ import annotations

from typing import Any

import torch

from sightline.parallel.context.mask import ContextMask, WholeRows
from sightline.parallel.context.plan import plan_context
from sightline.parallel.mesh import Mesh, divisors, nearest


def split_context(inputs: dict[str, Any], model: Any, mesh: Mesh) -> dict[str, Any]:
    """From what the model's forward takes of whole rows, on the CPU, to what it takes of this process's tokens.

    Tokens, labels, positions and what else the model says of each token become [B, S / degree], its masks of tokens
    become ContextMasks. All else, as the images of the rows, stays whole: every process computes it, for its own tokens
    only, so its gradients add up over the processes like all others.

    Errors: ValueError for rows that so many processes cannot share.
    """
    degree, rank = mesh.size("context"), mesh.index("context")
    if degree == 1:
        return inputs
    masks = inputs["attention_masks"]
    named = masks if isinstance(masks, dict) else {"attention": masks}
    of_tokens = {str(layer.mask_name) for layer in model.layers.values()}
    planned = {name: mask for name, mask in named.items() if name in of_tokens}
    layers = {name: model.attention_shape(name)[0] for name in planned}
    plan = plan_context(planned, degree, mesh.parallel.context_order, layers=layers)
    owned = None
    if model.row_heads is not None:
        owned = torch.stack([plan.queries(peer) for peer in range(degree)], dim=1)

    def cut(name: str) -> ContextMask:
        mask, send, receive = plan.view(rank, name)
        rows = None if owned is None else WholeRows(planned[name], owned)
        return ContextMask(mask.start, mask.stop, mask.key_length, send, receive, mesh.group("context"), rows)

    cut_masks = {name: cut(name) if name in planned else mask for name, mask in named.items()}
    of_token = {name: inputs[name] for name in ("tokens", "labels", "positions") if name in inputs}
    own = plan.queries(rank)
    loss_facts = {name: fact.gather(1, own) for name, fact in inputs.get("loss_facts", {}).items()}
    return {
        **inputs,
        **{name: value.gather(1, own) for name, value in (of_token | model.token_facts(inputs)).items()},
        **({"loss_facts": loss_facts} if loss_facts else {}),
        "attention_masks": cut_masks if isinstance(masks, dict) else cut_masks["attention"],
    }


def check_context(model: Any, mesh: Mesh, length: int) -> None:
    """Refuse rows of `length` tokens that the processes of `context` cannot share, and a model whose layers cannot.

    Errors: ValueError naming degrees that can.
    """
    degree = mesh.size("context")
    if length % degree:
        above = (length // degree + 1) * degree
        lengths = f"{above - degree} or {above}" if length > degree else f"{above}"
        raise ValueError(
            f"training.sequence-length {length} is not divisible by parallel.context {degree}, as many as share "
            f"a row; use --training.sequence-length {lengths}, or parallel.context {nearest(degree, divisors(length))}"
        )
    if model.row_heads is None:
        return
    heads = model.row_heads // mesh.size("tensor")
    if heads % degree:
        raise ValueError(
            f"parallel.context {degree} does not divide the {heads} key heads that parallel.tensor "
            f"{mesh.size('tensor')} leaves each process: layers with a memory walk along whole rows, and it is "
            f"their heads that are shared out; use parallel.context {nearest(degree, divisors(heads))}"
        )
