"""Load a model of transformers for a command."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def load_model(source: str, attention: str | None = None) -> PreTrainedModel:
    """Return the model of a directory, or of a name on the Hub, as the class that its config names.

    attention  attention implementation; None: the choice of transformers

    Raises:
        ValueError: if it cannot be loaded, or not with this attention; the message gives the reason.
    """
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot load {source}: expected a directory that save_pretrained of transformers wrote, or the name of a "
            f"model on the Hub, which is in the cache or can be downloaded; {_line(error)}"
        ) from error
    architecture = (config.architectures or [""])[0]
    model_class = getattr(transformers, architecture, AutoModelForCausalLM)
    try:
        return model_class.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"cannot load {source}: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
