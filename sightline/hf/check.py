"""The test that `enable` runs on a model: a packed row of two documents equals each document alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sightline.hf.calls import (
    implementations,
    measure_call,
    name_of,
    random_call,
    to_device,
    transformers_model,
)
from sightline.masks import document
from sightline.verify import LeakReport, Untestable
from sightline.verify.probe import find_tensor, unchanged

LENGTHS = (7, 9)


def check_packed(model: nn.Module) -> None:
    """Check on one packed row of 16 tokens that the second document does not depend on the first, and equals it alone.

    The documents alone have eager attention. Five short forwards and one backward, in evaluation mode. The model gets
    `position_ids`; if it refuses them, it gets every argument that states documents.

    Raises:
        ValueError: if a document leaks, and the message names the layer, or differs from the same document alone.
            Refusals of the model are raised.
    """
    inner = transformers_model(model)
    try:
        _check(model, inner)
    except Untestable:
        decoder = inner.base_model
        if decoder is inner or not isinstance(decoder, PreTrainedModel):
            raise
        _check(decoder, inner)  # a model with one output for each row, such as a reward model


def _check(model: nn.Module, inner: PreTrainedModel) -> None:
    with evaluation(model), unchanged(model):
        inputs, report = _measure(model, inner)
        if report.leaks:
            raise ValueError(
                f"{name_of(inner)}: the second document of a packed row depends on the first, from "
                f"{report.layer or 'the model itself'} ({report.kind}) on (relative change {report.change:.2g}, "
                f"gradient {report.gradient or 0:.2g}); do not pack rows for this model"
            )
        difference, bound = difference_from_alone(model, to_device(inputs, inner.device))
    if not difference <= bound:
        raise ValueError(
            f"{name_of(inner)}: a document of a packed row differs from the same document alone by {difference:.2g} of "
            f"the largest output, expected at most {bound:.2g}; do not pack rows for this model"
        )


def _measure(model: nn.Module, inner: PreTrainedModel) -> tuple[dict[str, Any], LeakReport]:
    """Return the arguments of the call that the model accepts, and the report of the leakage test with them."""
    inputs = random_call(inner, "position_ids", (LENGTHS,))
    ids = inputs.pop("documents")
    try:
        return inputs, measure_call(model, inner, inputs, document(ids), max_trials=1)
    except (Untestable, torch.OutOfMemoryError):
        raise
    except Exception:  # of any model; what it raises with all arguments says more
        inputs = random_call(inner, "cu_seq_lens", (LENGTHS,)) | {"document_ids": ids}
        del inputs["documents"]
    try:
        return inputs, measure_call(model, inner, inputs, document(ids), max_trials=1)
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{name_of(inner)} cannot run a packed row: {error!r}; do not pack rows for it") from error


@torch.no_grad()
def difference_from_alone(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[float, float]:
    """Return the largest difference of outputs, relative to the largest output, and the bound of rounding."""
    tokens = inputs["input_ids"]
    packed = find_tensor(model(**inputs), tokens.shape)
    parts = tokens.split(LENGTHS, dim=1)
    inner = transformers_model(model)
    before = implementations(inner)
    inner.set_attn_implementation({name: "eager" if used == "sightline" else used for name, used in before.items()})
    try:
        alone = [find_tensor(model(input_ids=part, use_cache=False), part.shape) for part in parts]
    finally:
        inner.set_attn_implementation(before)
    assert packed is not None, "the leakage test has found an output"
    expected = torch.cat([part for part in alone if part is not None], dim=1)
    difference = float((packed - expected).abs().max() / expected.abs().max())
    return difference, max(1e-2, 16 * torch.finfo(packed.dtype).eps)


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Run the block with the model in evaluation mode, and restore the mode of each module."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
