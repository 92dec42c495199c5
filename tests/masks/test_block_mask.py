import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from sightline.masks import AttentionMask, causal, document
from tests.support.random_masks import expressions

FIELDS = [
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
    actual = mask.to_block_mask(block_size)
    expected = create_block_mask(mask.mask_mod, rows, None, queries, keys, device="cpu", BLOCK_SIZE=block_size)
    assert actual.seq_lengths == expected.seq_lengths and actual.BLOCK_SIZE == expected.BLOCK_SIZE
    for field in FIELDS:
        one, other = getattr(actual, field), getattr(expected, field)
        assert one.dtype == other.dtype and torch.equal(one, other), field


@settings(max_examples=60, deadline=None)
@given(expressions(), st.integers(1, 9), st.integers(1, 9))
def test_equal_to_create_block_mask(pair, query_block, key_block) -> None:
    mask, _ = pair
    assert_same_blocks(mask, (query_block, key_block))


@settings(max_examples=30, deadline=None)
@given(expressions(), st.integers(1, 9), st.integers(2, 4), st.data())
def test_equal_to_create_block_mask_for_query_shards(pair, block, degree, data) -> None:
    mask, _ = pair
    rank = data.draw(st.integers(0, min(degree, mask.shape[1]) - 1))
    assert_same_blocks(mask.take_queries(torch.arange(rank, mask.shape[1], degree)), block)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 1000])
def test_equal_to_create_block_mask_at_block_size_128(length: int) -> None:
    ids = (torch.arange(2 * length) // 90 % 5).view(2, length)
    assert_same_blocks(causal(2, length) & document(ids), 128)


def test_without_query_blocks() -> None:
    blocks = causal(1, 300).to_block_mask(compute_q_blocks=False)
    assert blocks.q_indices is None and blocks.full_q_indices is None
    assert blocks.kv_num_blocks.tolist() == [[[1, 1, 3]]]
    assert blocks.full_kv_num_blocks.tolist() == [[[0, 1, 0]]]  # the last query block extends past the row


def test_invalid_block_size() -> None:
    with pytest.raises(ValueError, match="block_size"):
        causal(1, 8).to_block_mask(0)


def test_all_mask_mods_share_one_function() -> None:
    """Compiled kernels are keyed on the code object and the padded number of intervals."""
    one, other = causal(1, 8).mask_mod, (causal(1, 8) & document(torch.zeros(1, 8, dtype=torch.int32))).mask_mod
    assert one.__code__ is other.__code__
    index = one.__code__.co_freevars.index("num_intervals")
    assert one.__closure__[index].cell_contents == other.__closure__[index].cell_contents == 1
    three = AttentionMask.from_dense(torch.tensor([[[True, False, True, False, True]]])).mask_mod
    assert three.__closure__[index].cell_contents == 4  # padded to a power of two, so few kernels cover every K
