"""Packed attention for the models of transformers: importing this package registers attn_implementation="sightline"."""

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise ImportError("sightline.hf needs transformers 5: pip install 'sightline[hf]'") from error

from sightline.hf.attention import packed_attention
from sightline.hf.collator import PackedCollator
from sightline.hf.context import context_parallel
from sightline.hf.enable import NAME, disable, enable, is_enabled
from sightline.hf.groups import GroupedRows, pack_groups
from sightline.hf.leaks import leaks
from sightline.hf.log_probs import ResponseLogProbs, response_log_probs
from sightline.hf.masks import make_mask
from sightline.hf.share_prompts import share_prompts

AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, make_mask)

__all__ = [
    "NAME",
    "GroupedRows",
    "PackedCollator",
    "ResponseLogProbs",
    "context_parallel",
    "disable",
    "enable",
    "is_enabled",
    "leaks",
    "pack_groups",
    "response_log_probs",
    "share_prompts",
]
