"""Statistics of a mask, compared with its dense mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.masks import AttentionMask, causal, document, global_tokens, sliding_window
from sightline.masks import statistics as statistics_module
from sightline.masks.statistics import get_statistics, occupancy, segment_boundaries, visible_in_cells
from tests.support.random_masks import documents, packed, scattered_masks


@settings(max_examples=60, deadline=None)
@given(mask=scattered_masks(), tall=st.integers(1, 45), wide=st.integers(1, 45), data=st.data())
def test_occupancy_is_the_mean_of_the_dense_mask(
    mask: AttentionMask, tall: int, wide: int, data: st.DataObject
) -> None:
    row = data.draw(st.integers(0, mask.shape[0] - 1))
    dense = mask.to_dense()[row].double()
    _, queries, keys = mask.shape
    cells = [
        [dense[q : q + tall, k : k + wide] for k in range(0, keys, wide)] for q in range(0, queries, tall)
    ]  # slices end at the edge, so edge cells may be smaller
    assert torch.equal(
        visible_in_cells(mask, row, (tall, wide)), torch.tensor([[c.sum() for c in line] for line in cells]).long()
    )
    expected = torch.tensor([[c.mean() for c in line] for line in cells], dtype=torch.float64)
    torch.testing.assert_close(occupancy(mask, row, (tall, wide)), expected, rtol=1e-12, atol=0)


def test_occupancy_of_a_causal_mask() -> None:
    assert visible_in_cells(causal(1, 5), 0, (2, 2)).tolist() == [[3, 0, 0], [4, 3, 0], [2, 2, 1]]
    assert occupancy(causal(1, 5), 0, (2, 2)).tolist() == [[0.75, 0, 0], [1, 0.75, 0], [1, 1, 1]]


@settings(max_examples=60, deadline=None)
@given(mask=scattered_masks(), size=st.integers(1, 45), max_blocks=st.sampled_from([1, 7, 2**22]))
def test_block_counts_equal_those_of_the_dense_mask(mask: AttentionMask, size: int, max_blocks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics_module, "MAX_BLOCKS_PER_STEP", max_blocks)
        statistics = get_statistics(mask, size)
    _, queries, keys = mask.shape
    sums = [
        int(dense[q : q + size, k : k + size].sum())
        for dense in mask.to_dense()
        for q in range(0, queries, size)
        for k in range(0, keys, size)
    ]
    full, empty = sums.count(size * size), sums.count(0)
    assert statistics.blocks == (full, len(sums) - full - empty, empty)
    assert statistics.visible_pairs == mask.to_dense().sum((1, 2)).tolist()


def test_block_counts_equal_those_of_the_block_mask() -> None:
    mask = packed(300, 41, 700, padding=30)
    full, partial, empty = get_statistics(mask, 128).blocks
    block_mask = mask.to_block_mask(128)
    assert block_mask.full_kv_num_blocks is not None
    assert (full, partial) == (int(block_mask.full_kv_num_blocks.sum()), int(block_mask.kv_num_blocks.sum()))
    assert full + partial + empty == 9 * 9


def test_statistics_of_a_causal_mask() -> None:
    statistics = get_statistics(causal(2, 4), 2)
    assert (statistics.queries, statistics.keys, statistics.intervals) == (4, 4, 1)
    assert statistics.visible_pairs == [10, 10]
    assert (statistics.share_of_causal, statistics.sparsity) == (1.0, 1 - 10 / 16)
    assert statistics.blocks == (2, 4, 2)
    assert statistics.describe() == "S 4, K 1, 10 visible pairs (100.0% of causal)"


def test_cross_attention_has_no_share_of_causal() -> None:
    statistics = get_statistics(document(documents(1, 1), documents(3, 5)))
    assert statistics.share_of_causal is None
    assert statistics.describe() == "Q 2, T 8, K 1, 8 visible pairs (50.0% of all)"


def test_invalid_block_size() -> None:
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        get_statistics(causal(1, 4), 0)


def test_segment_boundaries_are_document_starts() -> None:
    assert segment_boundaries(packed(3, 4, 1, 2), 0) == [3, 7, 8]
    assert segment_boundaries(packed(3, 4, padding=3), 0) == [3, 7]  # padding is one segment
    assert segment_boundaries(packed(6) & sliding_window(1, 6, 2), 0) == []
    assert segment_boundaries(document(documents(2, 2)) | global_tokens(torch.arange(4)[None] == 0), 0) == []
    assert segment_boundaries(document(documents(2, 2), documents(3, 5)), 0) == []  # queries and keys differ


@settings(max_examples=60, deadline=None)
@given(mask=scattered_masks(longest=12, square=True))
def test_no_visible_pair_crosses_a_segment_boundary(mask: AttentionMask) -> None:
    dense = mask.to_dense()[0]
    fully_masked = ~dense.any(1)
    expected = [
        token
        for token in range(1, len(dense))
        if not dense[token:, :token].any()
        and not dense[:token, token:].any()
        and not (fully_masked[token] and fully_masked[token - 1])
    ]
    assert segment_boundaries(mask, 0) == expected
