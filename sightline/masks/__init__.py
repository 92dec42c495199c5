"""Attention masks as key intervals: AttentionMask, the rules that build one, and the conversions to kernel inputs."""

from sightline.masks import rules
from sightline.masks.mask import AttentionMask, named_masks
from sightline.masks.rules import *  # noqa: F403  # a new rule is added in one module of rules/ only

__all__ = ["AttentionMask", "named_masks"]
__all__ += rules.RULES
