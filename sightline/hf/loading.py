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
        architecture = (config.architectures or [""])[0]
        model_class = getattr(transformers, architecture, AutoModelForCausalLM)
        return model_class.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"cannot load {source}{f' with attention {attention}' if attention else ''}: {reason} Expected a directory "
            "that save_pretrained wrote, or the name of a model on the Hub, in the cache or with a network"
        ) from error
