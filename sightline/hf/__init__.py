"""Packed attention for the models of transformers: importing this package registers attn_implementation="sightline"."""

from transformers import AttentionInterface, AttentionMaskInterface

from sightline.hf.attention import attention
from sightline.hf.collator import PackedCollator
from sightline.hf.enable import NAME, disable, enable, is_enabled
from sightline.hf.groups import GroupedRows, pack_groups
from sightline.hf.log_probs import ResponseLogProbs, response_log_probs
from sightline.hf.masks import make_mask
from sightline.hf.share_prompts import share_prompts

AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, make_mask)

__all__ = [
    "NAME",
    "GroupedRows",
    "PackedCollator",
    "ResponseLogProbs",
    "disable",
    "enable",
    "is_enabled",
    "pack_groups",
    "response_log_probs",
    "share_prompts",
]
