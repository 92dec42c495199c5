"""Old names of config fields, accepted until version 0.4 with a warning that names the new one."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

RENAMED = (
    # models
    ("width", "hidden_size"),
    ("layers", "num_layers"),
    ("heads", "num_heads"),
    ("kv_heads", "num_kv_heads"),
    ("head_size", "head_dim"),
    ("ffn", "intermediate_size"),
    ("dense_ffn", "intermediate_size_mlp"),
    ("expert_ffn", "moe_intermediate_size"),
    ("shared_ffn", "shared_expert_intermediate_size"),
    ("experts", "num_experts"),
    ("shared_experts", "num_shared_experts"),
    ("expert_groups", "num_expert_groups"),
    ("groups_per_token", "num_limited_groups"),
    ("expert_scale", "routed_scaling_factor"),
    ("experts_every", "moe_layer_interval"),
    ("dense_layers", "num_dense_layers"),
    ("balance_rate", "expert_bias_update_rate"),
    ("auxiliary_loss", "aux_loss_coef"),
    ("prediction_weight", "mtp_loss_weight"),
    ("window", "sliding_window"),
    ("chunk", "attention_chunk_size"),
    ("full_every", "no_rope_layer_interval"),
    ("attention_every", "full_attention_interval"),
    ("rotary_share", "partial_rotary_factor"),
    ("query_rank", "q_lora_rank"),
    ("kv_rank", "kv_lora_rank"),
    ("plain_size", "qk_nope_head_dim"),
    ("rope_size", "qk_rope_head_dim"),
    ("value_size", "v_head_dim"),
    ("key_heads", "linear_num_key_heads"),
    ("value_heads", "linear_num_value_heads"),
    ("key_size", "linear_key_head_dim"),
    ("value_size", "linear_value_head_dim"),
    ("taps", "linear_conv_kernel_dim"),
    ("merge", "spatial_merge_size"),
    ("projector", "projector_hidden_size"),
    ("image_token", "image_token_id"),
    ("channels", "num_channels"),
    ("side", "position_grid_size"),
    # sections of a run
    ("validation_share", "validation_fraction"),
    ("decay_share", "decay_ratio"),
    ("final_share", "min_lr_ratio"),
)
"""(old name, new name). It applies to configs that have a field with the new name and none with the old name."""


class _AcceptsOldNames(type):
    """Metaclass that accepts old field names as keyword arguments of a config."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        for old in old_names(cls).keys() & kwargs.keys():
            _warn(cls, old)
        return super().__call__(*args, **use_new_names(cls, kwargs))


class RenamedFields(metaclass=_AcceptsOldNames):
    """Base class of configs with renamed fields: the old names work as arguments and as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in old_names(type(self)):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self, _warn(type(self), name))


def old_names(kind: type) -> dict[str, str]:
    """Return {old name: new name} of the renamed fields of a config class; empty for any other class."""
    if not issubclass(kind, RenamedFields) or not dataclasses.is_dataclass(kind):
        return {}
    fields = {field.name for field in dataclasses.fields(kind)}
    return {old: new for old, new in RENAMED if new in fields and old not in fields}


def renaming_message(old: str, new: str) -> str:
    """Return the warning about a name that is still accepted."""
    return f"{old} is now called {new}; the old name will be removed in version 0.4"


def use_new_names(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Return `values` with the new field names. If both names of a field are given, the old one counts."""
    names = old_names(kind)
    current = {name: value for name, value in values.items() if name not in names}
    return current | {names[name]: value for name, value in values.items() if name in names}


def _warn(kind: type, old: str) -> str:
    """Warn the caller that a field was renamed, and return the new name."""
    new = old_names(kind)[old]
    warnings.warn(renaming_message(f"{kind.__name__}.{old}", new), FutureWarning, stacklevel=3)
    return new
