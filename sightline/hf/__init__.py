"""Packed attention for the models of transformers: importing this package registers attn_implementation="sightline"."""

from transformers import AttentionInterface, AttentionMaskInterface

from sightline.hf.attention import attention
from sightline.hf.enable import NAME, disable, enable, is_enabled
from sightline.hf.masks import make_mask

AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, make_mask)

__all__ = ["NAME", "disable", "enable", "is_enabled"]
