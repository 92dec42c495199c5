"""Masks as data: AttentionMask, the rules that make one, and the inputs that kernels take."""

from sightline.masks import rules
from sightline.masks.mask import AttentionMask, named_masks
from sightline.masks.rules import *  # noqa: F403  # a rule is added in rules.py alone

__all__ = ["AttentionMask", "named_masks"]
__all__ += rules.__all__
