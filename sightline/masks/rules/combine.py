"""Union and intersection of any number of masks, as functions."""

from __future__ import annotations

import functools
import operator

from sightline.masks.mask import AttentionMask

__all__ = ["and_masks", "or_masks"]


def and_masks(*masks: AttentionMask) -> AttentionMask:
    """Intersection: the pairs visible in all masks."""
    return functools.reduce(operator.and_, _require_masks(masks, "and_masks"))


def or_masks(*masks: AttentionMask) -> AttentionMask:
    """Union: the pairs visible in any of the masks."""
    return functools.reduce(operator.or_, _require_masks(masks, "or_masks"))


def _require_masks(masks: tuple[AttentionMask, ...], name: str) -> tuple[AttentionMask, ...]:
    if not masks:
        raise ValueError(f"{name} needs at least one mask, got none")
    return masks
