"""Trees: documents that continue others, and draft tokens that continue others."""

from __future__ import annotations

import torch
from torch import Tensor

from sightline.masks.intervals import segment_bounds
from sightline.masks.mask import AttentionMask
from sightline.masks.rules.arguments import check_count, check_token_tensors
from sightline.masks.rules.documents import document

__all__ = ["shared_prefix", "prefix_tree", "token_tree"]  # noqa: RUF022  # the order in errors and help texts


def shared_prefix(document_ids: Tensor, prefix_ids: Tensor) -> AttentionMask:
    """Shared prefix: each query attends to its document and to the document given by `prefix_ids`, its prompt.

    A prompt and its responses are packed as separate documents, and each response points to the prompt, so the prompt
    is computed once (DPO pairs, grouped rollouts). Responses do not attend to each other. Combine with `& causal(...)`.

    document_ids  int [B, S]; -1: padding
    prefix_ids    int [B, S], id of the document that this one continues; its own id if it continues none
    """
    check_token_tensors("shared_prefix", document_ids=document_ids, prefix_ids=prefix_ids)
    prefix_ids = torch.where(document_ids < 0, document_ids, prefix_ids)
    return document(document_ids) | document(prefix_ids, document_ids)


def prefix_tree(document_ids: Tensor, parent_ids: Tensor) -> AttentionMask:
    """Tree of shared prefixes: each query attends to its document and to all of that document's ancestors.

    K is at most the depth of the tree; a document packed directly after its parent needs no further interval. Combine
    with `& causal(...)`.

    document_ids  int [B, S]; -1: padding
    parent_ids    int [B, S], id of the document that this one continues; its own id at a root

    Raises:
        ValueError: if the parents form a cycle, or a parent is not in the row.
    """
    check_token_tensors("prefix_tree", document_ids=document_ids, parent_ids=parent_ids)
    is_token = document_ids >= 0
    mask = document(document_ids)
    ancestor = torch.where(is_token, parent_ids, -1)
    while True:
        step = document(ancestor, document_ids)
        if bool(((step.stop <= step.start).all(dim=2) & is_token).any()):
            raise ValueError(
                "prefix_tree: parent_ids contain an id that is not in document_ids of the row; a root has its own id"
            )
        # parent_ids at any token of the ancestor, here its first, is the parent of the ancestor.
        parent = torch.where(is_token, parent_ids.gather(1, step.start[..., 0].long()), -1)
        extended = mask | step
        if extended.equal(mask):  # no new ancestors: all are roots, or there is a cycle
            if not torch.equal(parent, ancestor):
                raise ValueError("prefix_tree: parent_ids form a cycle; a root must have its own id as parent")
            return mask
        mask, ancestor = extended, parent


def token_tree(parents: Tensor, context_length: int = 0) -> AttentionMask:
    """Tree of tokens: each query attends to itself, to its ancestors, and to the context before the tree.

    Speculative decoding verifies the draft tokens of a tree in one forward pass (SpecInfer, arXiv:2305.09781; Medusa,
    arXiv:2401.10774; EAGLE, arXiv:2401.15077). The queries are the tokens of the tree; the keys are those of the
    context, then those of the tree. K is at most 1 plus the number of tokens, on any path, that do not directly follow
    their parent.

    parents         int [B, Q], index of the parent in the tree, before its child; -1: a root; less than -1: padding
    context_length  keys before the tree, such as those of a cache: T = context_length + Q

    Raises:
        ValueError: if a parent does not come before its child, or is padding.
    """
    check_token_tensors("token_tree", parents=parents)
    check_count("token_tree", "context_length", context_length, 0, "is a number of keys")
    parents = parents.long()
    index = torch.arange(parents.shape[1], device=parents.device).expand_as(parents)
    is_token = parents >= -1
    parent_is_token = is_token.gather(1, parents.clamp(min=0, max=max(0, parents.shape[1] - 1)))
    wrong = is_token & ((parents >= index) | ((parents >= 0) & ~parent_is_token))
    if bool(wrong.any()):
        row, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"token_tree: the parent of token {token} in row {row} is {int(parents[row, token])}; expected the index "
            "of an earlier token that is not padding, or -1 for a root; order the tree so that parents come first"
        )
    head, _ = segment_bounds(parents != index - 1)  # the first token of the run in which each one's parent precedes it
    head = head.long()
    starts, stops = [torch.zeros_like(index)], [context_length * is_token]
    token, active = index, is_token
    while bool(active.any()):
        first = head.gather(1, token)
        starts.append((first + context_length) * active)
        stops.append((token + 1 + context_length) * active)
        token = parents.gather(1, first)
        active = active & (token >= 0)
        token = token.clamp(min=0)
    key_length = context_length + parents.shape[1]
    return AttentionMask.from_intervals(torch.stack(starts, dim=2), torch.stack(stops, dim=2), key_length)
