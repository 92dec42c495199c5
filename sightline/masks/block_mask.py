"""Convert an AttentionMask to FlexAttention's BlockMask without evaluating single query-key pairs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sightline.masks.mask_mod import build_mask_mod


def build_block_mask(
    start: Tensor, stop: Tensor, key_length: int, block_size: int | tuple[int, int], compute_q_blocks: bool
) -> BlockMask:
    """Implementation of `AttentionMask.to_block_mask`. start, stop: canonical int32 [B, Q, K]."""
    query_block, key_block = (block_size, block_size) if isinstance(block_size, int) else block_size
    if query_block < 1 or key_block < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    partial, full = block_states(start, stop, key_length, query_block, key_block)
    kv_num, kv_indices = _ordered(partial)
    full_kv_num, full_kv_indices = _ordered(full)
    q_side: tuple[Tensor | None, ...] = (None,) * 4
    if compute_q_blocks:
        q_side = (*_ordered(partial.mT), *_ordered(full.mT))
    q_num, q_indices, full_q_num, full_q_indices = q_side
    return BlockMask(
        seq_lengths=(start.shape[1], key_length),
        kv_num_blocks=kv_num,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=(query_block, key_block),
        mask_mod=build_mask_mod(start, stop, key_length),
    )


def block_states(
    start: Tensor, stop: Tensor, key_length: int, query_block: int, key_block: int
) -> tuple[Tensor, Tensor]:
    """Return the partial and the full blocks: bool [B, query blocks, key blocks] each.

    A block that extends past the last query or key is never full, as in `create_block_mask`.

    Each interval overlaps a run of key blocks and fully covers a (shorter) run of them. Adding +1 where such a run
    starts and -1 where it ends, for all queries of a block, and taking a prefix sum along the keys counts the queries
    that overlap and that cover each block. Canonical intervals are disjoint and not adjacent, so at most one interval
    of a query covers a block.
    """
    rows, queries, num_intervals = start.shape
    query_blocks, key_blocks = -(-queries // query_block), -(-key_length // key_block)
    line = (
        torch.arange(queries, device=start.device) // query_block
        + torch.arange(rows, device=start.device).unsqueeze(1) * query_blocks
    )
    # index of the first counter of each query's line of blocks
    base = (line * (key_blocks + 1)).unsqueeze(2).expand(rows, queries, num_intervals)
    nonempty = stop > start

    def count(first: Tensor, end: Tensor) -> Tensor:
        one = ((end > first) & nonempty).to(torch.int32).flatten()
        counters = torch.zeros(rows * query_blocks * (key_blocks + 1), dtype=torch.int32, device=start.device)
        counters.scatter_add_(0, (base + first).flatten(), one)
        counters.scatter_add_(0, (base + torch.maximum(end, first)).flatten(), -one)
        lines = counters.view(rows, query_blocks, key_blocks + 1)
        return lines.cumsum(dim=2, dtype=torch.int32)[..., :key_blocks]

    touched = count(start // key_block, (stop + key_block - 1) // key_block) > 0
    full = count((start + key_block - 1) // key_block, stop // key_block) == query_block
    return touched & ~full, full


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of true blocks in each line, and all block indices with those of the true blocks first.

    blocks: bool [B, N, M]. Returns int32 [B, 1, N] and int32 [B, 1, N, M]. Both groups of indices are ascending, the
    order that `create_block_mask` gets from a stable descending sort; a prefix sum computes it without sorting.
    """
    blocks = blocks.contiguous()
    index = torch.arange(blocks.shape[2], dtype=torch.int32, device=blocks.device)
    before = blocks.cumsum(dim=2, dtype=torch.int32)
    number = blocks.sum(dim=2, keepdim=True, dtype=torch.int32)
    position = torch.where(blocks, before - 1, number + index - before)
    indices = torch.empty_like(position)
    indices.scatter_(2, position.long(), index.expand_as(position))
    return number.squeeze(2).unsqueeze(1), indices.unsqueeze(1)
