"""Refusals for models that have the attention's name alone: `enable` has neither checked nor prepared them."""

from __future__ import annotations

import inspect
import sys
from functools import lru_cache

from torch import nn
from transformers import PreTrainedModel

from sightline.hf.documents import Documents
from sightline.hf.positions import has_limited_rope
from sightline.hf.recurrence import is_beside_recurrence

NO_CUMULATIVE_LENGTHS = {"NemotronAttention", "StableLmAttention"}
"""Layers that receive position_ids from their model, but not cu_seq_lens_q and seq_idx."""


def refuse_without_enable(layer: nn.Module, documents: Documents | None) -> None:
    """Refuse what the arguments of an attention layer cannot show.

    Raises:
        ValueError: if documents are packed in a model that numbers positions itself or has recurrent layers, or they
            may have been stated by an argument that does not reach the layer.
    """
    name = type(layer).__name__
    if documents is None:
        return
    if documents.packed and not _takes_position_ids(type(layer).__module__):
        raise ValueError(
            f"{name}: this model takes no position_ids: positions run on from document to document; do not pack rows "
            "for this model"
        )
    if documents.packed and is_beside_recurrence(layer):
        raise ValueError(
            f"{name}: this model has recurrent layers, which carry a state from one document to the next; call "
            "sightline.hf.enable(model), which resets it or refuses"
        )
    if documents.packed and has_limited_rope(getattr(layer, "config", None), documents.ids.shape[1]):
        raise ValueError(
            f"{name}: RoPE takes the frequencies of all documents from the largest position of the row; call "
            "sightline.hf.enable(model), which refuses only rows in which this differs from each document alone"
        )
    if name in NO_CUMULATIVE_LENGTHS and documents.source == "position_ids" and not documents.packed:
        raise ValueError(
            f"{name}: this model passes position_ids to this layer, but not cu_seq_lens_q, so that sightline cannot "
            "tell one document from several; call sightline.hf.enable(model) once after loading it"
        )


@lru_cache
def _takes_position_ids(source: str) -> bool:
    """Return whether a model with a language head in the named module takes position_ids; True if it has none."""
    members = vars(sys.modules[source]).values()
    models = [m for m in members if isinstance(m, type) and issubclass(m, PreTrainedModel) and m.can_generate()]
    signatures = [inspect.signature(model.forward).parameters for model in models]
    return not signatures or any("position_ids" in parameters for parameters in signatures)
