"""Where documents begin, read off a mask, for layers that carry a state along the row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.masks.mask import AttentionMask


def number_segments(mask: AttentionMask) -> Tensor:
    """int64 [B, Q]: 1, 2, ... for the documents that begin among these tokens; 0 continues what a cache holds.

    The mask is `causal & document`, whose queries are the last Q of its T tokens. There a token sees its document from
    the first token on: it is that token when it sees nothing before itself. A run of padding is a document too.

    Raises:
        ValueError: the documents of the mask are not runs of tokens.
    """
    if mask.intervals > 1:
        raise ValueError(
            f"a recurrent layer needs documents that are one run of tokens each, got a mask of {mask.intervals} "
            "intervals a query; give it causal(...) & document(...) with every document in one piece"
        )
    _, queries, keys = mask.shape
    index = torch.arange(keys - queries, keys, dtype=torch.int32, device=mask.device)
    seeing = mask.visible_queries()
    after_padding = F.pad(~seeing[:, :-1], (1, 0))  # the first token here comes after whatever the cache holds
    return torch.where(seeing, mask.start[..., 0] == index, ~after_padding).cumsum(dim=1)
