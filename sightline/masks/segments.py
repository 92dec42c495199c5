"""Document numbers derived from a mask, for recurrent layers, which reset their state at each document start."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.masks.mask import AttentionMask


def number_segments(mask: AttentionMask) -> Tensor:
    """Number the documents of a `causal & document` mask whose queries are the last Q of its T tokens: int64 [B, Q].

    Documents that start among the queries get 1, 2, ...; 0 continues the document of a cached state. A token is the
    first of its document if its interval starts at itself. A run of padding counts as a document too.

    Raises:
        ValueError: if a document is not one run of tokens.
    """
    if mask.intervals > 1:
        raise ValueError(
            f"a recurrent layer needs documents that are one run of tokens each, got a mask of {mask.intervals} "
            "intervals per query; use causal(...) & document(...) with contiguous documents"
        )
    _, queries, keys = mask.shape
    index = torch.arange(keys - queries, keys, dtype=torch.int32, device=mask.device)
    visible = mask.visible_queries()
    after_padding = F.pad(~visible[:, :-1], (1, 0))  # what precedes the first query does not count as padding
    return torch.where(visible, mask.start[..., 0] == index, ~after_padding).cumsum(dim=1)
