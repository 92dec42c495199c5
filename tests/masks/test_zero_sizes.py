"""Masks without rows, queries, keys or tokens, through every rule, operator, conversion and statistic."""

from collections.abc import Callable

import pytest
import torch

from sightline.masks import (
    AttentionMask,
    bidirectional,
    block_diffusion,
    causal,
    chunked,
    document,
    global_tokens,
    prefix_lm,
    prefix_tree,
    shared_prefix,
    sliding_window,
)
from sightline.masks.segments import number_segments
from sightline.masks.statistics import get_statistics, occupancy, segment_boundaries, visible_in_cells
from tests.support.random_masks import assert_canonical


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


RULES: dict[str, Callable[[int, int], AttentionMask]] = {
    "causal": causal,
    "document": lambda b, s: document(zeros(b, s)),
    "sliding_window": lambda b, s: sliding_window(b, s, 2),
    "chunked": lambda b, s: chunked(zeros(b, s), 2),
    "prefix_lm": lambda b, s: prefix_lm(zeros(b, s), zeros(b, s)),
    "bidirectional": lambda b, s: bidirectional(zeros(b, s)),
    "global_tokens": lambda b, s: global_tokens(zeros(b, s).bool()),
    "shared_prefix": lambda b, s: shared_prefix(zeros(b, s), zeros(b, s)),
    "prefix_tree": lambda b, s: prefix_tree(zeros(b, s), zeros(b, s)),
    "block_diffusion": lambda b, s: block_diffusion(zeros(b, s), zeros(b, s), zeros(b, s), 2),
    "queries only": lambda b, s: document(zeros(b, 3), zeros(b, s)),
    "keys only": lambda b, s: document(zeros(b, s), zeros(b, 3)),
    "from_dense": lambda b, s: AttentionMask.from_dense(zeros(b, s, s).bool()),
    "from_intervals": lambda b, s: AttentionMask.from_intervals(zeros(b, s, 3), zeros(b, s, 3) + 1, s),
    "from_mask_mod": lambda b, s: AttentionMask.from_mask_mod(lambda b, h, q, k: q >= k, b, s, s),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("rows", "length"), [(0, 3), (2, 0), (0, 0)])
def test_sizes_of_zero(rule: str, rows: int, length: int) -> None:
    mask = RULES[rule](rows, length)
    _, queries, keys = mask.shape
    dense = torch.zeros(mask.shape, dtype=torch.bool)
    assert torch.equal(mask.to_dense(), dense)
    assert_canonical(mask)
    mask.validate()
    assert (mask & mask).equal(mask) and (mask | mask).equal(mask)
    assert AttentionMask.from_dense(dense).equal(mask)
    assert AttentionMask.from_mask_mod(mask.mask_mod, *mask.shape).equal(mask)
    assert mask.visible_pairs().tolist() == [0] * rows
    assert mask.visible_queries().shape == (rows, queries)
    assert mask.take_queries(torch.zeros(0, dtype=torch.int64)).shape == (rows, 0, keys)
    assert mask[[]].shape == (0, queries, keys) and mask[:0].shape == (0, queries, keys)
    blocks = mask.to_block_mask(2)
    assert blocks.seq_lengths == (queries, keys) and not blocks.kv_num_blocks.any()
    assert blocks.kv_num_blocks.shape == (rows, 1, -(-queries // 2))
    assert get_statistics(mask, 2).blocks == (0, 0, rows * -(-queries // 2) * -(-keys // 2))
    assert "K 1, 0 visible pairs (0.0%" in get_statistics(mask).describe()
    assert number_segments(mask).shape == (rows, queries)
    for row in range(rows):
        assert segment_boundaries(mask, row) == []
        assert visible_in_cells(mask, row, (2, 2)).shape == occupancy(mask, row, (2, 2)).shape
    if queries == keys:
        layout = mask.to_varlen()
        assert layout.cu_seqlens.tolist() == [0] and layout.max_length == 0 and layout.padding is None
    else:
        with pytest.raises(ValueError, match="varlen needs queries and keys to be the same tokens"):
            mask.to_varlen()


def test_queries_without_keys_and_keys_without_queries() -> None:
    for queries, keys in ((3, 0), (0, 3)):
        mask = AttentionMask.from_mask_mod(lambda b, h, q, k: q >= k, 2, queries, keys)
        assert mask.shape == (2, queries, keys) and not mask.to_dense().any()
        assert mask.to_block_mask().to_dense().shape == (2, 1, -(-queries // 128), -(-keys // 128))
