import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from sightline.masks import AttentionMask, causal, document
from tests.support.random_masks import expressions

SIDES = [
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
]


def assert_same_blocks(mask: AttentionMask, block_size) -> None:
    rows, queries, keys = mask.shape
    ours = mask.to_block_mask(block_size)
    theirs = create_block_mask(mask.mask_mod, rows, None, queries, keys, device="cpu", BLOCK_SIZE=block_size)
    assert ours.seq_lengths == theirs.seq_lengths and ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    for side in SIDES:
        one, other = getattr(ours, side), getattr(theirs, side)
        assert one.dtype == other.dtype and torch.equal(one, other), side


@settings(max_examples=60, deadline=None)
@given(expressions(), st.integers(1, 9), st.integers(1, 9))
def test_equal_to_create_block_mask(pair, query_block, key_block) -> None:
    mask, _ = pair
    assert_same_blocks(mask, (query_block, key_block))


@settings(max_examples=30, deadline=None)
@given(expressions(), st.integers(1, 9), st.integers(2, 4), st.data())
def test_equal_for_shards_of_queries(pair, block, degree, data) -> None:
    mask, _ = pair
    rank = data.draw(st.integers(0, min(degree, mask.shape[1]) - 1))
    assert_same_blocks(mask.take_queries(torch.arange(rank, mask.shape[1], degree)), block)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 1000])
def test_equal_at_the_usual_block_size(length: int) -> None:
    ids = (torch.arange(2 * length) // 90 % 5).view(2, length)
    assert_same_blocks(causal(2, length) & document(ids), 128)


def test_without_the_backward_side() -> None:
    blocks = causal(1, 300).to_block_mask(compute_q_blocks=False)
    assert blocks.q_indices is None and blocks.full_q_indices is None
    assert blocks.kv_num_blocks.tolist() == [[[1, 1, 3]]]
    assert blocks.full_kv_num_blocks.tolist() == [[[0, 1, 0]]]  # the last block of queries reaches past the row


def test_block_size_is_checked() -> None:
    with pytest.raises(ValueError, match="block_size"):
        causal(1, 8).to_block_mask(0)


def test_all_mask_mods_are_one_function() -> None:
    """One code object and one number of intervals: what a compiled kernel is keyed on."""
    one, other = causal(1, 8).mask_mod, (causal(1, 8) & document(torch.zeros(1, 8, dtype=torch.int32))).mask_mod
    assert one.__code__ is other.__code__
    width = one.__code__.co_freevars.index("width")
    assert one.__closure__[width].cell_contents == other.__closure__[width].cell_contents == 1
    three = AttentionMask.from_dense(torch.tensor([[[True, False, True, False, True]]])).mask_mod
    assert three.__closure__[width].cell_contents == 4  # rounded up, so few kernels serve every K
