"""Trees of documents that continue others, as packed rows hold them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline.masks import document


def check_tree(ids: Tensor, parents: Tensor, positions: Tensor) -> None:
    """Check that each document comes after the one that it continues, and that its positions continue as well.

    ids        int [B, S]; -1: padding
    parents    int [B, S], the document that each token's document continues; its own id if none
    positions  int64 [B, S]

    Raises:
        ValueError: if a mask that is causal by index would be wrong, or windows by position could not be intervals.
    """
    index = torch.arange(ids.shape[1])
    is_token, continues = ids >= 0, parents != ids
    starts = F.pad(ids.diff(dim=1) != 0, (1, 0), value=True)
    parent = document(parents, ids)
    stop = parent.stop[..., -1].long()
    if document(ids).start.shape[2] > 1 or bool((is_token & continues & ((stop < 1) | (stop > index))).any()):
        raise ValueError(
            "prefix_ids need documents whose tokens are next to each other in the row, each after the document that it "
            "continues, which must be in the row; correct prefix_ids, or reorder the row"
        )
    previous = torch.where(starts, positions.gather(1, (stop - 1).clamp(min=0)), F.pad(positions[:, :-1], (1, 0)))
    wrong = is_token & (continues | ~starts) & (positions != previous + 1)
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            "position_ids must ascend by 1 in each document of a tree, and from a document to those that continue it, "
            f"but token {token} of row {row} has position {int(positions[row, token])} after "
            f"{int(previous[row, token])}; correct position_ids or prefix_ids"
        )
