"""Forward of an enabled model: it finds the documents before the model runs, from the arguments of the call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sightline.hf.documents import CONTEXT, Documents, find_documents, one_document_per_row
from sightline.hf.layer_masks import lower_before_forward
from sightline.hf.masks import PendingMask
from sightline.hf.positions import check_positions, takes_positions
from sightline.hf.recurrence import CACHES, pass_documents
from sightline.hf.replaced import previous_forward, replace_by, restore
from sightline.hf.running import current, enter_forward, inherited, leave_forward
from sightline.masks import AttentionMask
from sightline.torch_private import disable_compiler

ADDED = ("document_lengths", "document_ids", "prefix_ids", "attention_masks")
"""Keyword arguments that `enable` adds to a model."""
GIVEN = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "position_ids")
"""Keyword arguments of transformers that may state documents."""
TOKENS = ("input_ids", "inputs_embeds")
POSITION_START = "_sightline_position_start"
"""Attribute of an enabled model: position of a document's first token."""
_PACKED = "_sightline_packed"
"""Attribute of a cache that holds keys of several documents in a row."""


def replace_forward(model: nn.Module, position_start: int) -> None:
    """Let the forward of a model find the documents of each call.

    Code that calls `model.forward` in place of the model, as PEFT does, is covered, and a forward that others have set
    before is called.
    """
    signature = _signature(model.forward)
    replace_by(model, _forward).__signature__ = signature  # type: ignore[attr-defined]  # trainers read it
    vars(model)[POSITION_START] = position_start


def restore_forward(model: nn.Module) -> None:
    """Undo `replace_forward`. If others have wrapped the new forward since then, it stays and does nothing."""
    vars(model).pop(POSITION_START, None)
    restore(model, _forward)


def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    """Return a signature without annotations, which pickle may not know."""
    signature = inspect.signature(forward)
    parameters = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return inspect.Signature(parameters)


def _forward(model: nn.Module, previous: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """Compute an enabled model, in place of its forward: `previous`, or that of its class."""
    forward = previous_forward(model, previous)
    if POSITION_START not in vars(model):
        return forward(*args, **kwargs)
    kwargs = _enter(model, args, kwargs, _is_compiled())
    try:
        return _mark_cache(forward(**pass_documents(model, kwargs)))
    finally:
        leave_forward(model)


def _is_compiled() -> bool:
    """Return whether the forward is compiled: torch.compile compiles this call even if it cannot compile the caller."""
    return torch.compiler.is_compiling()


@disable_compiler
def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool) -> dict[str, Any]:
    """Find the documents of a call, make them current, and return the other arguments by name."""
    if args:
        kwargs = {
            **dict(zip(list(inspect.signature(type(module).forward).parameters)[1:], args, strict=False)),
            **kwargs,
        }
    if isinstance(mask := kwargs.get("attention_mask"), PendingMask):  # `generate` made it for a static cache
        kwargs["attention_mask"] = mask.padding
    given = {name: kwargs.pop(name) for name in ADDED if name in kwargs}
    outer = inherited(module)
    divided = outer is not None and outer.source == CONTEXT
    _check_context(kwargs.pop(CONTEXT, False), divided, given)
    # The forward that calls this one has found the documents of its tokens.
    documents = outer if outer is not None and not given else documents_of_call(kwargs, given)
    first = documents is not outer or divided  # of the forwards of these tokens
    if first and documents is not None and documents.packed:
        if takes_positions(module, documents, kwargs):
            device = next(kwargs[name].device for name in TOKENS if kwargs.get(name) is not None)
            positions = documents.index_in_document + vars(module)[POSITION_START]
            kwargs["position_ids"] = positions.to(device, non_blocking=True)
        check_positions(module, documents, kwargs.get("position_ids"), vars(module)[POSITION_START])
    if compiled and first:
        lower_before_forward(module, documents)
    enter_forward(module, documents)
    return kwargs


@disable_compiler
def _mark_cache(output: Any) -> Any:
    """Note in the cache of an output that it holds packed rows, and return the output."""
    documents = current()
    if documents is not None and documents.packed:
        for name in CACHES:
            if (cache := getattr(output, name, None)) is not None and hasattr(cache, "__dict__"):
                vars(cache)[_PACKED] = True
    return output


def documents_of_call(kwargs: dict[str, Any], given: dict[str, Any]) -> Documents | None:
    """Return the documents of a forward with these arguments; None if it continues a cache."""
    tokens = next((kwargs[name] for name in TOKENS if kwargs.get(name) is not None), None)
    if not isinstance(tokens, Tensor) or tokens.dim() < 2:
        return None
    shape = (tokens.shape[0], tokens.shape[1])
    masks = given.pop("attention_masks", None)
    mask = kwargs.get("attention_mask")
    if masks is not None:
        if given:
            raise ValueError(
                f"attention_masks and {', '.join(given)} both say which tokens attend to which; pass one of them: "
                "attention_masks take the place of all rules, documents too"
            )
        ids = torch.zeros(shape, dtype=torch.int32)
        return Documents(ids, "attention_masks", masks=_check_masks(masks, shape))
    if isinstance(mask, dict):  # by layer type, from `generate` or the caller
        mask = next(iter(mask.values()), None)
        mask = mask.padding if isinstance(mask, PendingMask) else mask
    if isinstance(mask, Tensor) and mask.dim() not in (2, 4):
        raise ValueError(
            f"attention_mask has the shape {list(mask.shape)}; expected [B, S], where 0 is padding, or [B, 1, S, S]"
        )
    if mask is not None and mask.dim() == 4 and not given:
        return one_document_per_row(shape, "attention_mask")
    cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
    if cache is not None and hasattr(cache, "get_seq_length"):
        _refuse_packed_cache(cache)
        if _holds_tokens(cache):
            _refuse_given(given)
            return None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        mask = mask[:, : shape[1]]  # a static cache has room for tokens that come later
        if tuple(mask.shape) != shape:
            raise ValueError(f"attention_mask has the shape {list(mask.shape)}; expected [B, S] = {list(shape)}")
    sources = {name: kwargs.get(name) for name in GIVEN}
    found = find_documents(shape, attention_mask=mask, **sources, **given)
    return one_document_per_row(shape, "the default positions") if found is None else found


def _holds_tokens(cache: Any) -> bool:
    try:
        return int(cache.get_seq_length()) > 0
    except ValueError:  # only recurrent layers, which count no tokens
        return bool(cache.has_previous_state())


def _check_masks(masks: Any, shape: tuple[int, int]) -> dict[str, AttentionMask]:
    """Return the masks of a caller by layer type."""
    named = dict(masks) if isinstance(masks, Mapping) else {"full_attention": masks}
    for name, mask in named.items():
        if not isinstance(mask, AttentionMask) or mask.shape != (*shape, shape[1]):
            found = mask if isinstance(mask, AttentionMask) else type(mask).__name__
            raise ValueError(
                f"attention_masks of {name} is {found}; expected a sightline.masks.AttentionMask of (B, Q, T) = "
                f"{(*shape, shape[1])}; AttentionMask.from_dense converts a mask bool [B, S, S]"
            )
    return named


def _check_context(local: bool, divided: bool, given: dict[str, Any]) -> None:
    """Check that arguments for a part of the tokens and documents of divided rows come together."""
    if local and not divided:
        raise ValueError(
            "these arguments are a part of the tokens of each row: call the model inside of the block, `with "
            "sightline.hf.context_parallel(model, group, batch) as local: model(**local)`"
        )
    if given and divided:
        raise ValueError(
            f"{', '.join(given)} cannot be given to a model inside of context_parallel, which has divided the rows: "
            "state documents in the batch that context_parallel receives"
        )


def _refuse_packed_cache(cache: Any) -> None:
    if getattr(cache, _PACKED, False):
        raise ValueError(
            "the cache holds several documents of a row: packed rows cannot continue a cache; run each document in a "
            "row of its own"
        )


def _refuse_given(given: dict[str, Any]) -> None:
    if given:
        raise ValueError(
            f"{', '.join(given)} cannot be given together with a cache that holds tokens: packed rows cannot continue "
            "a cache; run each document in a row of its own"
        )
