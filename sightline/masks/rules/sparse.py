"""Sparse attention: windows with global tokens and with random blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from sightline.masks.intervals import find_runs
from sightline.masks.mask import AttentionMask
from sightline.masks.rules.arguments import check_count, check_token_tensors, single_interval

__all__ = ["global_tokens", "bigbird"]  # noqa: RUF022  # the order in errors and help texts


def global_tokens(is_global: Tensor) -> AttentionMask:
    """Global tokens: all queries attend to the global keys, and global queries attend to all keys.

    K is the number of runs of global tokens. Combine with `| sliding_window(...)`, causal or on both sides (Longformer,
    arXiv:2004.05150), then with `& document(...)`, or with `& prefix_tree(...)` and a window by position.

    is_global  bool [B, S]
    """
    check_token_tensors("global_tokens", is_global=is_global)
    length = is_global.shape[1]
    flags = is_global.to(torch.int32)
    start, stop = find_runs(flags, torch.ones_like(flags))
    full_stop = torch.where(is_global, length, 0).to(torch.int32)
    return AttentionMask(start, stop, length) | single_interval(torch.zeros_like(full_stop), full_stop, length)


def bigbird(
    batch_size: int,
    length: int,
    block: int,
    *,
    num_random_blocks: int = 3,
    num_window_blocks: int = 3,
    num_global_blocks: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> AttentionMask:
    """BigBird (Zaheer et al. 2020, arXiv:2007.14062): blocks of a window, of the start of the row, and random ones.

    Each query attends to the window of blocks around its own, to the global blocks, and to random blocks that are
    neither; queries of global blocks attend to all keys. The random blocks depend on the seed only, on any device, and
    are the same for all rows and heads. K is at most 2 + num_random_blocks. Costs O(S K + (S / block)^2). Blocks are
    counted from the start of the row, so a row should be one document.

    block              tokens per block; the last block may be shorter
    num_random_blocks  random blocks of each query; fewer where fewer blocks are left
    num_window_blocks  blocks of the window, the query's own block in the middle: odd
    num_global_blocks  global blocks at the start of the row
    """
    check_count("bigbird", "block", block, 1, "is a number of tokens")
    check_count("bigbird", "num_random_blocks", num_random_blocks, 0, "is a number of blocks")
    check_count("bigbird", "num_window_blocks", num_window_blocks, 1, "is a number of blocks")
    check_count("bigbird", "num_global_blocks", num_global_blocks, 0, "is a number of blocks")
    if num_window_blocks % 2 == 0:
        raise ValueError(
            f"bigbird: num_window_blocks must be odd, the query's block in the middle; got {num_window_blocks}"
        )
    num_blocks = -(-length // block)
    side = num_window_blocks // 2
    number = torch.arange(num_blocks)
    visible = ((number[:, None] - number).abs() <= side) | (number < num_global_blocks)
    order = torch.rand(num_blocks, num_blocks, generator=torch.Generator().manual_seed(seed))
    # Where fewer blocks are left, the rest are visible ones, which change nothing.
    random = order.masked_fill(visible, -1).topk(min(num_random_blocks, num_blocks), dim=1).indices
    global_stop = torch.where(number < num_global_blocks, num_blocks, num_global_blocks)[:, None]
    start = torch.cat([torch.zeros_like(global_stop), (number - side)[:, None], random], dim=1)
    stop = torch.cat([global_stop, (number + side + 1)[:, None], random + 1], dim=1)
    blocks = AttentionMask.from_intervals((start * block)[None], (stop * block)[None], length)
    return blocks.take_queries(torch.arange(length) // block)[[0] * batch_size].to(device)
