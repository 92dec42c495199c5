"""Recurrent layers over packed rows: each document is computed in a row of its own.

A recurrent layer (Gated DeltaNet, Kimi Delta Attention, Mamba, a short convolution, lightning attention, RG-LRU)
carries a state along a row. In transformers the state passes from document to document, unless a GPU kernel is
installed that knows `cu_seq_lens_q` or `seq_idx`. Here the layer is called with the documents as rows, a few of similar
length at a time, so each starts from an empty state: with any kernel, on any device.

Layers are recognized by the names below, most of them methods of transformers' caches. Tried with transformers 5.16 to
5.24.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from sightline.hf.documents import Documents
from sightline.hf.replaced import previous_forward, replace_by, restore
from sightline.hf.rows import rows_of, take
from sightline.hf.running import current
from sightline.torch_private import disable_compiler

STATE_NAMES = {
    "get_conv_state", "update_conv_state", "get_recurrent_state", "update_recurrent_state",  # most layers
    "conv_states", "recurrent_states", "ssm_states",  # before transformers 5.22
    "get_linear_cache", "conv1d_state",  # MiniMax, RecurrentGemma
    "rwkv_linear_attention",
}  # fmt: skip
"""Attributes that the methods of a recurrent layer name, and those of no other layer."""

ATTENDS = "ALL_ATTENTION_FUNCTIONS"
"""Name by which an attention layer of transformers finds its attention function."""

ARGUMENT = "sightline_documents"
"""Keyword argument by which a decoder passes the documents to its layers, and to their recomputation in backward."""

PASSES_DOCUMENTS = "_sightline_passes_documents"
"""Attribute of a decoder of recurrent layers, which passes them the documents."""

_WAS_PACKED = "_sightline_was_packed"
"""Attribute of a layer that gets no keyword arguments and has computed packed rows."""

CACHES = ("cache", "cache_params", "past_key_values")
EMPTY = {**dict.fromkeys((*CACHES, "attention_mask")), "use_cache": False}
"""Values of arguments that do not apply to a document in a row of its own."""
DROPPED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "cu_seqlens"}
"""Arguments that describe packed rows. A row of one document needs none of them."""


def enable_recurrence(model: nn.Module) -> list[str]:
    """Reset the recurrent layers of a model at documents, and return the classes of these layers.

    Rows of one document, and generation with a cache, take the same path as before.
    """
    kinds = set()
    for decoder, layer in _recurrent_layers(model):
        if _is_supported(layer):
            replace_by(layer, _forward)
            kinds.add(type(layer).__name__)
            vars(decoder)[PASSES_DOCUMENTS] = True
    return sorted(kinds)


def disable_recurrence(model: nn.Module) -> None:
    """Revert `enable_recurrence`."""
    for module in model.modules():
        vars(module).pop(_WAS_PACKED, None)
        vars(module).pop(PASSES_DOCUMENTS, None)
        restore(module, _forward)


def unsupported_recurrence(model: nn.Module) -> str | None:
    """Return why packed rows would be wrong in recurrent layers of a model, with the remedy; None if they are right."""
    kinds = sorted({type(layer).__name__ for _, layer in _recurrent_layers(model) if not _is_supported(layer)})
    if not kinds:
        return None
    return (
        f"{', '.join(kinds)} carries a state from one document of a row to the next, and sightline cannot call it with "
        "each document in a row of its own; do not pack rows for this model"
    )


def needs_positions(model: nn.Module) -> bool:
    """Return whether a model has layers that attend, so that the positions of its documents matter."""
    layers = [module for module in model.modules() if not isinstance(module, PreTrainedModel)]
    return not any(_names(layer) & STATE_NAMES for layer in layers) or any(ATTENDS in _names(layer) for layer in layers)


def is_beside_recurrence(layer: nn.Module) -> bool:
    """Return whether the modeling file of a layer has recurrent layers too."""
    return _has_recurrence(type(layer).__module__)


@functools.cache
def _has_recurrence(module: str) -> bool:
    classes = [x for x in vars(sys.modules[module]).values() if isinstance(x, type) and issubclass(x, nn.Module)]
    layers: list[Any] = [cls for cls in classes if not issubclass(cls, PreTrainedModel)]
    return any(_names_in_class(cls) & STATE_NAMES for cls in layers)


def _recurrent_layers(module: nn.Module, decoder: nn.Module | None = None) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield each recurrent layer with the innermost model of transformers that contains it."""
    if isinstance(module, PreTrainedModel):
        decoder = module
    elif decoder is not None and _names(module) & STATE_NAMES:
        yield decoder, module
        return
    for child in module.children():
        yield from _recurrent_layers(child, decoder)


def _names(module: nn.Module) -> frozenset[str]:
    """Return the attributes and functions that the methods of a module's class name."""
    return _names_in_class(type(module))  # type: ignore[arg-type]  # mypy takes the class for a module


@functools.cache
def _names_in_class(cls: type) -> frozenset[str]:
    methods = (
        inspect.unwrap(method)
        for base in cls.__mro__
        if base is not nn.Module and issubclass(base, nn.Module)
        for method in vars(base).values()
        if inspect.isfunction(method)
    )
    return frozenset(name for method in methods for name in method.__code__.co_names)


def _is_supported(layer: nn.Module) -> bool:
    """Return whether a layer is the whole recurrent layer, which takes hidden states and a mask of padding."""
    takes_mask = "attention_mask" in inspect.signature(type(layer).forward).parameters
    return takes_mask and ATTENDS not in _names(layer)


def pass_documents(decoder: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Add the documents of the running forward to the arguments that a decoder passes to its recurrent layers."""
    if PASSES_DOCUMENTS not in vars(decoder):
        return kwargs
    return {**kwargs, ARGUMENT: _documents_for(decoder, kwargs.get("attention_mask"))}


@disable_compiler
def _documents_for(module: nn.Module, mask: Any) -> Documents | None:
    """Return the documents of the running forward, if the module's own mask of padding is not enough to compute them.

    It is if each row has one document, or continues a cache.

    Raises:
        ValueError: if the documents are not known, or some of their tokens are elsewhere.
    """
    documents, name = current(), type(module).__name__
    if documents is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 4 and documents.source == "attention_mask":
        raise ValueError(
            f"{name} has recurrent layers, which a mask [B, 1, Q, T] does not tell where documents start; pass "
            "document_ids"
        )
    if not documents.packed:
        return documents if mask is None and bool((documents.ids[:, 0] < 0).any()) else None
    if documents.masks is not None:
        raise ValueError(
            f"{name} has recurrent layers, which need all tokens of a document in order: attention_masks and context "
            "parallelism are for models without them; pass document_ids, or prefix_ids too for shared prefixes"
        )
    return documents


def _forward(layer: nn.Module, previous: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """Compute a recurrent layer, in place of its forward: `previous`, or that of its class."""
    forward = previous_forward(layer, previous)
    documents = kwargs.pop(ARGUMENT) if ARGUMENT in kwargs else _documents_without_argument(layer, kwargs)
    if documents is None:
        return forward(*args, **kwargs)
    return _forward_documents(layer, forward, documents, args, kwargs)


@disable_compiler
def _documents_without_argument(layer: nn.Module, kwargs: dict[str, Any]) -> Documents | None:
    """Return the documents of the running forward, in a model that passes no keyword arguments to this layer.

    Raises:
        ValueError: if the layer is recomputed in the backward pass, after that forward, and has had packed rows.
    """
    was_packed = vars(layer).get(_WAS_PACKED, False)
    if current() is None and was_packed and all(kwargs.get(name) is None for name in CACHES):
        raise ValueError(
            f"{type(layer).__name__}: gradient checkpointing recomputes this layer in the backward pass, where its "
            "documents are not known any more, because the model passes the layer no keyword arguments; disable "
            "gradient checkpointing for this model, or do not pack rows"
        )
    documents = _documents_for(layer, kwargs.get("attention_mask"))
    # Layers are recomputed in training mode only; the check of `enable` runs in evaluation mode.
    vars(layer)[_WAS_PACKED] = was_packed or (layer.training and documents is not None)
    return documents


@disable_compiler
def _forward_documents(
    layer: nn.Module,
    forward: Callable[..., Any],
    documents: Documents,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Compute a layer with each document as a row. Its cache stays empty, since packed rows cannot be continued."""
    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    hidden = named.pop(names[0])
    named = {name: x for name, x in named.items() if name not in DROPPED}
    named |= {name: EMPTY[name] for name in named.keys() & EMPTY.keys()}
    others: list[None] = []

    def compute(tokens: Tensor) -> Tensor:
        output = forward(take(hidden, tokens), **{name: _of_rows(x, tokens, hidden) for name, x in named.items()})
        if not isinstance(output, tuple):
            return output
        others[:] = [None] * (len(output) - 1)  # states, and weights that are None
        return output[0]

    output = rows_of(documents, hidden.device).compute(compute, (hidden.shape[0], hidden.shape[1]))
    return (output, *others) if others else output


def _of_rows(x: Any, tokens: Tensor, hidden: Tensor) -> Any:
    """Return the part of an argument that belongs to the tokens [N, L], if it has one value per token."""
    batch, length = hidden.shape[:2]
    if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == length and x.shape[0] in (1, batch):
        return take(x.expand(batch, *x.shape[1:]), tokens)
    return x
