"""RoPE fields of config.json: base and scaling, in the older and the newer format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sightline.layers import Llama3RopeScaling, YarnScaling
from sightline.models.hf.format import read_field, read_fields, write_fields

CONTEXT = {"original_context": "original_max_position_embeddings"}
LLAMA3 = {name: name for name in ("factor", "low_freq_factor", "high_freq_factor")} | CONTEXT
YARN = {name: name for name in ("factor", "beta_fast", "beta_slow")} | CONTEXT | {"truncate": "truncate"}
"""{field of our RoPE scaling: field of config.json}."""


def rope_fields(hf: Mapping[str, Any], *known: str) -> dict[str, Any]:
    """Return the fields `rope_theta` and `rope_scaling` of our config.

    Raises:
        ValueError: as `read_rope`.
    """
    rope = read_rope(hf, *known)
    return {"rope_theta": rope["rope_theta"], "rope_scaling": read_scaling(rope)}


def read_rope(hf: Mapping[str, Any], *known: str) -> dict[str, Any]:
    """Return the RoPE fields of config.json: rope_theta, rope_type ("default" without scaling) and those of the type.

    Older files have rope_theta and rope_scaling; newer files have both in rope_parameters.

    Raises:
        ValueError: if the type is neither "default" nor in `known`.
    """
    scaling = read_field(hf, "rope_parameters", dict) or read_field(hf, "rope_scaling", dict, {})
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", *known):
        raise ValueError(
            f"config.json has the RoPE type {kind!r}, which is not supported for {hf['architectures'][0]}; expected "
            f"{' or '.join(('default', *known))}"
        )
    context = {"original_max_position_embeddings": hf.get("max_position_embeddings")}
    return {"rope_theta": hf.get("rope_theta", 10_000.0), **context, **scaling, "rope_type": kind}


def read_scaling(rope: dict[str, Any]) -> Any:
    """Return the RoPE scaling for the fields from `read_rope`: None, a Llama3RopeScaling or a YarnScaling."""
    if rope["rope_type"] == "llama3":
        return Llama3RopeScaling(**read_fields(rope, LLAMA3))
    if rope["rope_type"] == "yarn":
        return _read_yarn(rope)
    return None


def _read_yarn(rope: dict[str, Any]) -> YarnScaling:
    mscales: dict[str, Any] = {name: rope.get(name) for name in ("mscale", "mscale_all_dim")}
    if not all(mscales.values()):  # transformers ignores them unless both are set
        mscales = {}
    betas = {"beta_fast": rope.get("beta_fast") or 32.0, "beta_slow": rope.get("beta_slow") or 1.0}
    scaling = YarnScaling(**read_fields({**rope, **betas}, YARN, truncate=True), **mscales)
    actual = read_field(rope, "attention_factor", float)
    if actual is not None and abs(actual - scaling.rotation_factor) > 1e-6:
        raise ValueError(
            f"config.json has the YaRN attention_factor {actual}; expected {scaling.rotation_factor}, which follows "
            "from its factor, mscale and mscale_all_dim"
        )
    return scaling


def write_rope(theta: float, scaling: Llama3RopeScaling | YarnScaling | None) -> dict[str, Any]:
    """Return rope_theta and rope_scaling for config.json, the older format that every version of transformers reads."""
    fields: dict[str, Any] | None = None
    if isinstance(scaling, Llama3RopeScaling):
        fields = {"rope_type": "llama3", **write_fields(scaling, LLAMA3)}
    if isinstance(scaling, YarnScaling):
        fields = {"rope_type": "yarn", **write_fields(scaling, YARN)}
        if scaling.mscale_all_dim:
            fields |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return {"rope_theta": theta, "rope_scaling": fields}
