"""Lowered masks for tests that call a layer without a model."""

from typing import Any

import torch

from sightline.attention import Lowered, lower
from sightline.masks import AttentionMask


def lowered(mask: AttentionMask, dtype: torch.dtype = torch.float32, **options: Any) -> Lowered:
    return lower(mask, **{"device": "cpu", "dtype": dtype, "training": True, **options})
