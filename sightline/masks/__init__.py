"""Masks as data: AttentionMask, the rules that make one, and the forms that kernels take."""

from sightline.masks.mask import AttentionMask, named_masks
from sightline.masks.rules import (
    and_masks,
    bidirectional,
    block_diffusion,
    causal,
    chunked,
    document,
    global_tokens,
    or_masks,
    prefix_lm,
    prefix_tree,
    shared_prefix,
    sliding_window,
)

__all__ = [
    "AttentionMask",
    "and_masks",
    "bidirectional",
    "block_diffusion",
    "causal",
    "chunked",
    "document",
    "global_tokens",
    "named_masks",
    "or_masks",
    "prefix_lm",
    "prefix_tree",
    "shared_prefix",
    "sliding_window",
]
