"""Calls of a model of transformers on small packed rows of random tokens, and the leakage test of one call."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from sightline.verify import LeakReport, leaks
from sightline.verify.influence import Masks

LENGTHS = ((13, 8, 11), (9, 23))
"""Tokens of the documents of two random rows."""

CALLS = {
    "position_ids": "position_ids",
    "no_cache": "position_ids, use_cache=False",
    "ones_mask": "position_ids, use_cache=False, attention_mask of ones",
    "cu_seq_lens": "position_ids, use_cache=False, cu_seq_lens_*, max_length_*, seq_idx",
    "two_rows": "two packed rows, position_ids, use_cache=False",
    "mrope_3": "position_ids [3, B, S], use_cache=False",
    "mrope_4": "position_ids [4, B, S], use_cache=False",
    "document_ids": "document_ids, no position_ids",
}
"""Calls of a model on packed rows: {name: arguments besides input_ids}. The two of M-RoPE are for models that have it,
`document_ids` is for enabled ones."""


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """Return the outermost model of transformers in a module.

    Raises:
        ValueError: if there is none.
    """
    found = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if found is None:
        raise ValueError(f"expected a model of transformers, or one that wraps it, got {type(model).__name__}")
    return found


def implementations(model: PreTrainedModel) -> dict[str, str]:
    """Return the attention implementations of a model and its parts, as `set_attn_implementation` takes them."""
    config = model.config
    names = {name: getattr(config, name, None) for name in config.sub_configs}
    return {
        "": config._attn_implementation,
        **{name: sub._attn_implementation for name, sub in names.items() if sub is not None},
    }


def position_start(model: nn.Module) -> int:
    """Return the position of a document's first token: 0, or 2 in RoBERTa and its kind, which count after padding."""
    for module in model.modules():
        if hasattr(module, "create_position_ids_from_input_ids") and isinstance(module.padding_idx, int):
            return module.padding_idx + 1
    return 0


def name_of(model: PreTrainedModel) -> str:
    """Return the name of a model's class, without the prefix of FSDP2."""
    return type(model).__name__.removeprefix("FSDP")


def random_call(model: PreTrainedModel, name: str, lengths: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
    """Return the arguments of a call of CALLS on random rows, and `documents`, int64 [B, S]."""
    config, start = model.config, position_start(model)
    lengths = lengths or (LENGTHS if name == "two_rows" else LENGTHS[:1])
    positions = torch.stack([torch.cat([torch.arange(start, start + n) for n in row]) for row in lengths])
    documents = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in lengths])
    allowed = torch.ones(config.get_text_config(decoder=True).vocab_size, dtype=torch.bool)
    allowed[[token for token in special_ids(config) if token < len(allowed)]] = False
    generator = torch.Generator().manual_seed(0)
    ids = allowed.nonzero()[:, 0]
    ids = ids[torch.randint(len(ids), positions.shape, generator=generator)]
    call: dict[str, Any] = {"input_ids": ids, "position_ids": positions, "documents": documents}
    if name == "document_ids":
        return {"input_ids": ids, "document_ids": documents, "documents": documents}
    if name != "position_ids":
        call["use_cache"] = False
    if name == "ones_mask":
        call["attention_mask"] = torch.ones_like(ids)
    if name == "cu_seq_lens":
        tokens = torch.tensor([n for row in lengths for n in row])
        offsets = F.pad(tokens.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(tokens.max())
        call |= {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "seq_idx": documents.to(torch.int32)}
        call |= {"max_length_q": longest, "max_length_k": longest}
    if name in ("mrope_3", "mrope_4"):
        call["position_ids"] = positions.expand(int(name[-1]), *positions.shape)
    return call


def special_ids(config: PreTrainedConfig) -> set[int]:
    """Return the ids of a config that stand for something else than text: padding, images, ends of documents."""
    found: set[int] = set()

    def collect(values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                collect(value)
            elif re.search(r"token_(id|index)s?$", str(name)):
                found.update(x for x in (value if isinstance(value, list | tuple) else [value]) if type(x) is int)

    collect(config.to_dict())
    return {token for token in found if token >= 0}


def measure_call(
    model: nn.Module, inner: PreTrainedModel, inputs: Mapping[str, Any], masks: Masks, max_trials: int | None = None
) -> LeakReport:
    """Run the leakage test with these arguments. Special tokens are not changed."""
    fixed = special_ids(inner.config)
    return leaks(model, to_device(inputs, inner.device), masks, fixed_ids=fixed, max_trials=max_trials)


def to_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return arguments with their tensors on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
