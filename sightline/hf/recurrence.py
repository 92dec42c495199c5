"""Recurrent layers over packed rows: each document is computed in a row of its own.

A recurrent layer (Gated DeltaNet, Kimi Delta Attention, Mamba, a short convolution, lightning attention, RG-LRU)
carries a state along a row. In transformers the state passes from document to document, unless a GPU kernel is installed
that knows `cu_seq_lens_q` or `seq_idx`. Here the layer is called with the documents as rows, a few of similar length at a
time, so each starts from an empty state: with any kernel, on any device.

Layers are recognized by the names below, most of them methods of transformers' caches. Tried with transformers 5.16 to
5.24.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sightline.attention import LocalExchanges
from sightline.hf.documents import Documents, current
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

ARGUMENT = "sightline_rows"
"""Keyword argument by which a decoder passes the documents to its layers, and to their recomputation in backward."""

_HAD_ROWS = "_sightline_had_rows"
"""Attribute of a layer that gets no keyword arguments and has computed packed rows."""

MASKS = {"attention_mask", "conv_mask"}
CACHES = {"cache", "cache_params", "past_key_values"}
DROPPED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "cu_seqlens"}
"""Arguments that describe packed rows. A row of one document needs none of them."""

MOST_PADDING = 1.5
"""Documents of one group differ in length by at most this factor: little padding, and few calls of the layer."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Documents as rows, in groups of similar length.

    tokens  for each group, int64 [N, L], the tokens of each row as indices into the B * S tokens of the forward. Rows
            are padded on the right with their first token
    kept    for each group, int64 [K], the outputs to keep, as indices into its N * L
    places  int64 [B * S], for each token of the forward, its place in the kept outputs of all groups; that of padding
            is after them
    """

    tokens: list[Tensor]
    kept: list[Tensor]
    places: Tensor


def enable_recurrence(model: nn.Module) -> list[str]:
    """Reset the recurrent layers of a model at documents, and return the classes of these layers.

    Rows of one document, and generation with a cache, take the same path as before.
    """
    kinds = set()
    for decoder, layer in _recurrent_layers(model):
        if _is_supported(layer):
            vars(layer)["forward"] = functools.partial(_forward, layer, vars(layer).get("forward"))
            kinds.add(type(layer).__name__)
            if _hand_down not in decoder._forward_pre_hooks.values():
                decoder.register_forward_pre_hook(_hand_down, with_kwargs=True)
    return sorted(kinds)


def disable_recurrence(model: nn.Module) -> None:
    """Revert `enable_recurrence`."""
    for module in model.modules():
        vars(module).pop(_HAD_ROWS, None)
        forward = vars(module).get("forward")
        if isinstance(forward, functools.partial) and forward.func is _forward:
            del vars(module)["forward"]
            if forward.args[1] is not None:
                vars(module)["forward"] = forward.args[1]
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _hand_down]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]


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
    layers = {type(module) for module in model.modules() if not isinstance(module, PreTrainedModel)}
    return not any(True for _ in _recurrent_layers(model)) or any(ATTENDS in _names(cls) for cls in layers)


def _recurrent_layers(module: nn.Module, decoder: nn.Module | None = None) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yield each recurrent layer with the innermost model of transformers that contains it."""
    if isinstance(module, PreTrainedModel):
        decoder = module
    elif decoder is not None and _names(type(module)) & STATE_NAMES:
        yield decoder, module
        return
    for child in module.children():
        yield from _recurrent_layers(child, decoder)


@functools.cache
def _names(cls: type) -> frozenset[str]:
    """Return the attributes and functions that the methods of a class name."""
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
    return takes_mask and ATTENDS not in _names(type(layer))


@disable_compiler
def _hand_down(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Add the documents of the forward to the keyword arguments that a decoder passes to its layers."""
    tokens = next((x for x in (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args) if x is not None), None)
    device = torch.device("cpu") if tokens is None else tokens.device
    return args, {**kwargs, ARGUMENT: _find_rows(current(), device, type(decoder).__name__)}


def _find_rows(documents: Documents | None, device: torch.device, name: str) -> Rows | None:
    """Return the documents as rows, the same object for all calls of a forward; None if each row has one document."""
    if documents is None or not documents.packed:
        return None
    if documents.source == "attention_masks" or not isinstance(documents.exchanges, LocalExchanges):
        raise ValueError(
            f"{name} has recurrent layers, which need all tokens of a document in order: attention_masks and context "
            "parallelism are for models without them; pass document_ids, with prefix_ids for shared prefixes"
        )
    key = ("rows", device)
    if key not in documents.prepared:
        documents.prepared[key] = _to_rows(documents, device)
    return documents.prepared[key]


def _to_rows(documents: Documents, device: torch.device) -> Rows:
    """Return the documents as rows. A document that continues others has their tokens before its own."""
    sequences = sorted(_sequences(documents), key=lambda sequence: len(sequence[0]), reverse=True)
    groups: list[list[tuple[Tensor, int]]] = []
    for sequence in sequences:
        if not groups or len(groups[-1][0][0]) > MOST_PADDING * len(sequence[0]):
            groups.append([])
        groups[-1].append(sequence)
    padded, kept = [], []
    for group in groups:
        tokens = pad_sequence([tokens for tokens, _ in group], batch_first=True, padding_value=-1)
        length = torch.tensor([len(tokens) for tokens, _ in group])[:, None]
        own = torch.tensor([own for _, own in group])[:, None]
        index = torch.arange(tokens.shape[1])
        kept.append(((index < length) & (index >= length - own)).flatten().nonzero()[:, 0])
        padded.append(torch.where(tokens >= 0, tokens, tokens[:, :1]))
    order = torch.cat([tokens.flatten()[index] for tokens, index in zip(padded, kept, strict=True)])
    places = torch.full((documents.ids.numel(),), len(order))
    places[order] = torch.arange(len(order))
    return Rows([_send(x, device) for x in padded], [_send(x, device) for x in kept], _send(places, device))


def _sequences(documents: Documents) -> Iterator[tuple[Tensor, int]]:
    """Yield the tokens of each document after those that it continues, as indices into all rows, and how many it has."""
    ids, mask = documents.ids, documents.mask
    length = ids.shape[1]
    is_first = torch.nn.functional.pad(ids.diff(dim=1) != 0, (1, 0), value=True)
    first = (is_first & (ids >= 0)).flatten().nonzero()[:, 0]
    last = (is_first.roll(-1, dims=1).index_fill(1, torch.tensor([length - 1]), True) & (ids >= 0)).flatten().nonzero()
    starts, stops = (x.flatten(0, 1)[first].tolist() for x in (mask.start, mask.stop))
    for start, end, *intervals in zip(first.tolist(), (last[:, 0] + 1).tolist(), starts, stops, strict=True):
        row = start - start % length
        spans = sorted((row + a, min(row + b, end)) for a, b in zip(*intervals, strict=True))
        yield torch.cat([torch.arange(a, b) for a, b in spans if a < b]), end - start


def _send(index: Tensor, device: torch.device) -> Tensor:
    return index if device.type == "cpu" else index.to(device, non_blocking=True)


def _forward(layer: nn.Module, previous: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> Any:
    """Compute a recurrent layer over the rows of one forward."""
    forward = functools.partial(type(layer).forward, layer) if previous is None else previous
    rows = kwargs.pop(ARGUMENT) if ARGUMENT in kwargs else _find_rows_in_context(layer, args, kwargs)
    if rows is None:
        return forward(*args, **kwargs)
    return _forward_rows(layer, forward, rows, args, kwargs)


@disable_compiler
def _find_rows_in_context(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows | None:
    """Return the documents of the running forward, for a model that passes no keyword arguments to this layer.

    Raises:
        ValueError: if the layer is recomputed in the backward pass, after that forward, and has had packed rows.
    """
    hidden, documents = args[0] if args else kwargs["hidden_states"], current()
    rows = _find_rows(documents, hidden.device, type(layer).__name__)
    has_cache = any(kwargs.get(name) is not None for name in CACHES)
    if documents is None and not has_cache and vars(layer).get(_HAD_ROWS, False):
        raise ValueError(
            f"{type(layer).__name__}: gradient checkpointing recomputes this layer in the backward pass, where its "
            "documents are not known any more, because the model passes the layer no keyword arguments; disable "
            "gradient checkpointing for this model, or do not pack rows"
        )
    vars(layer)[_HAD_ROWS] = rows is not None or vars(layer).get(_HAD_ROWS, False)
    return rows


@disable_compiler
def _forward_rows(
    layer: nn.Module, forward: Callable[..., Any], rows: Rows, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Compute a layer with each document as a row. Its cache stays empty, since packed rows cannot be continued."""
    named = _by_name(type(layer), args, kwargs)
    hidden = named.pop(next(iter(named)))
    outputs = []
    for tokens, kept in zip(rows.tokens, rows.kept, strict=True):
        tokens, kept = tokens.to(hidden.device), kept.to(hidden.device)
        output = forward(_take(hidden, tokens), **{name: _of_rows(x, tokens, hidden) for name, x in named.items()})
        output, *others = output if isinstance(output, tuple) else (output,)
        outputs.append(output.flatten(0, 1).index_select(0, kept))
    padding = outputs[0].new_zeros(1, outputs[0].shape[-1])
    merged = torch.cat([*outputs, padding]).index_select(0, rows.places.to(hidden.device)).view(*hidden.shape[:2], -1)
    return (merged, *[None] * len(others)) if others else merged


def _by_name(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a layer by name, the hidden states first, without those that describe a packed row."""
    names = list(inspect.signature(cls.forward).parameters)[1:]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    first = {names[0]: named[names[0]]}
    rest = {name: None if name in MASKS | CACHES else x for name, x in named.items() if name not in DROPPED}
    if "use_cache" in rest:
        rest["use_cache"] = False
    return {**first, **rest}


def _of_rows(x: Any, tokens: Tensor, hidden: Tensor) -> Any:
    """Return the part of an argument that belongs to the tokens [N, L], if it has one value per token."""
    if isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == hidden.shape[1] and x.shape[0] in (1, hidden.shape[0]):
        return _take(x.expand(hidden.shape[0], *x.shape[1:]), tokens)
    return x


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    """x [B, S, ...], tokens [N, L] -> [N, L, ...]."""
    return x.flatten(0, 1).index_select(0, tokens.flatten()).unflatten(0, tokens.shape)
