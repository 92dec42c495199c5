"""RoPE in config.json: its base and its scaling, in the older and the newer form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sightline.layers import Llama3RopeScaling, YarnScaling
from sightline.models.hf.format import read_fields, write_fields

CONTEXT = {"original_context": "original_max_position_embeddings"}
LLAMA3 = {name: name for name in ("factor", "low_freq_factor", "high_freq_factor")} | CONTEXT
YARN = {name: name for name in ("factor", "beta_fast", "beta_slow")} | CONTEXT | {"truncate": "truncate"}
"""Fields of our scalings, and what config.json calls them."""


def rope_fields(hf: Mapping[str, Any], *known: str) -> dict[str, Any]:
    """The fields `rope_theta` and `rope_scaling` of our config. Raises as `read_rope`."""
    rope = read_rope(hf, *known)
    return {"rope_theta": rope["rope_theta"], "rope_scaling": read_scaling(rope)}


def read_rope(hf: Mapping[str, Any], *known: str) -> dict[str, Any]:
    """What config.json says of RoPE: "rope_theta", "rope_type" ("default" for none) and what that type has.

    Older files have rope_theta and rope_scaling, newer ones rope_parameters with both.
    Errors: ValueError for a type that is neither "default" nor one of the known.
    """
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", *known):
        raise ValueError(
            f"config.json has the RoPE type {kind!r}, which {hf['architectures'][0]} does not support here; expected "
            f"{' or '.join(('default', *known))}"
        )
    context = {"original_max_position_embeddings": hf.get("max_position_embeddings")}
    return {"rope_theta": hf.get("rope_theta", 10_000.0), **context, **scaling, "rope_type": kind}


def read_scaling(rope: dict[str, Any]) -> Any:
    """The scaling in what `read_rope` gives: None, a Llama3RopeScaling or a YarnScaling."""
    if rope["rope_type"] == "llama3":
        return Llama3RopeScaling(**read_fields(rope, LLAMA3))
    if rope["rope_type"] == "yarn":
        return _read_yarn(rope)
    return None


def _read_yarn(rope: dict[str, Any]) -> YarnScaling:
    mscales: dict[str, Any] = {name: rope.get(name) for name in ("mscale", "mscale_all_dim")}
    if not all(mscales.values()):  # transformers heeds them together or not at all
        mscales = {}
    betas = {"beta_fast": rope.get("beta_fast") or 32.0, "beta_slow": rope.get("beta_slow") or 1.0}
    scaling = YarnScaling(**read_fields({**rope, **betas}, YARN, truncate=True), **mscales)
    stated = rope.get("attention_factor")
    if stated is not None and abs(stated - scaling.rotation_factor) > 1e-6:
        raise ValueError(
            f"config.json has the YaRN attention_factor {stated}; expected {scaling.rotation_factor}, which its factor "
            "and its mscales give"
        )
    return scaling


def write_rope(theta: float, scaling: Llama3RopeScaling | YarnScaling | None) -> dict[str, Any]:
    """Both for a config.json, in the older form: every version of transformers reads it."""
    written: dict[str, Any] | None = None
    if isinstance(scaling, Llama3RopeScaling):
        written = {"rope_type": "llama3", **write_fields(scaling, LLAMA3)}
    if isinstance(scaling, YarnScaling):
        written = {"rope_type": "yarn", **write_fields(scaling, YARN)}
        if scaling.mscale_all_dim:
            written |= {"mscale": scaling.mscale, "mscale_all_dim": scaling.mscale_all_dim}
    return {"rope_theta": theta, "rope_scaling": written}
