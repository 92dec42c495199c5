"""Block-causal and BigBird masks equal a comparison of all pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.masks import bidirectional, bigbird, block_causal, block_diffusion, causal, chunked, document
from tests.support.random_masks import assert_canonical, documents, packed_rows, pairs


@settings(max_examples=100, deadline=None)
@given(packed_rows(), st.integers(1, 12))
def test_block_causal(rows, block: int) -> None:
    same = document(rows.document_ids)
    block_q, block_kv = pairs(rows.positions // block)
    mask = block_causal(rows.positions, block) & same
    assert torch.equal(mask.to_dense(), same.to_dense() & (block_kv <= block_q))
    assert mask.intervals == 1
    assert_canonical(mask)
    assert mask.equal((chunked(rows.positions, block) | causal(*rows.shape)) & same)


def test_block_causal_is_the_clean_half_of_block_diffusion() -> None:
    positions = torch.tensor([[*range(7), *range(7)]])
    ids = documents(7, 7)
    clean = block_diffusion(ids, torch.ones_like(ids), positions, 3)
    assert clean.take_queries(torch.arange(7, 14)).equal(block_causal(positions, 3).take_queries(torch.arange(7, 14)))


def test_blocks_of_different_lengths() -> None:
    """Frames of a video: bidirectional inside a frame, causal between frames, in one expression."""
    frames = documents(3, 1, 4)
    mask = bidirectional(frames) | causal(*frames.shape)
    frame_q, frame_kv = pairs(frames)
    assert torch.equal(mask.to_dense(), frame_kv <= frame_q)
    assert mask.intervals == 1


def test_block_causal_continues_a_document_of_an_earlier_row() -> None:
    mask = block_causal(torch.tensor([[3, 4, 5, 6, 0, 1]]), 4)
    assert mask.start[0, :, 0].tolist() == [0, 0, 0, 0, 4, 4]
    assert mask.stop[0, :, 0].tolist() == [1, 4, 4, 4, 6, 6]


BIGBIRD = [(64, 4, 3, 3, 1), (61, 4, 2, 5, 2), (33, 1, 4, 1, 0), (9, 16, 3, 3, 1), (40, 8, 0, 3, 1), (30, 5, 99, 1, 1)]


@pytest.mark.parametrize(("length", "block", "num_random", "num_window", "num_global"), BIGBIRD)
def test_bigbird(length: int, block: int, num_random: int, num_window: int, num_global: int) -> None:
    options = {"num_random_blocks": num_random, "num_window_blocks": num_window, "num_global_blocks": num_global}
    mask = bigbird(2, length, block, **options, seed=3)
    number = torch.arange(length) // block
    many = int(number[-1]) + 1
    q, kv = number[:, None], number[None, :]
    window, is_global = (q - kv).abs() <= num_window // 2, (q < num_global) | (kv < num_global)
    dense = mask.to_dense()
    assert torch.equal(dense[0], dense[1])
    assert (dense[0] | ~(window | is_global)).all()
    random = dense[0] & ~(window | is_global)
    for query in range(length):
        blocks = number[random[query]].unique()
        assert torch.equal(random[query], torch.isin(number, blocks))  # whole blocks
        q_block = int(number[query])
        occupied = {kv for kv in range(many) if abs(q_block - kv) <= num_window // 2 or kv < num_global}
        expected = 0 if q_block < num_global else min(num_random, many - len(occupied))
        assert len(blocks) == expected
    assert torch.equal(random, random[number * block])  # queries of a block share their random blocks
    assert mask.intervals <= 2 + num_random
    assert_canonical(mask)


def test_random_blocks_depend_on_the_seed_only() -> None:
    state = torch.random.get_rng_state()
    first = bigbird(1, 512, 8, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(1)
    assert bigbird(1, 512, 8, seed=0).equal(first)
    assert not bigbird(1, 512, 8, seed=1).equal(first)
    assert first.intervals == 5
    counts = (first.to_dense()[0, 8:] & (torch.arange(512) >= 256)).sum()
    assert 0.4 < counts / first.to_dense()[0, 8:].sum() < 0.6  # random blocks are spread over the row


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: block_causal(torch.arange(4)[None], 0), "block is a number of tokens .* got 0"),
        (lambda: block_causal(torch.arange(4), 2), r"positions must be integers \[B, S\]"),
        (lambda: bigbird(1, 16, 0), "block is a number of tokens .* got 0"),
        (lambda: bigbird(1, 16, 4, num_window_blocks=2), "must be odd.*got 2"),
        (lambda: bigbird(1, 16, 4, num_random_blocks=-1), "num_random_blocks .* got -1"),
        (lambda: bigbird(1, 16, 4, num_global_blocks=-1), "num_global_blocks .* got -1"),
    ],
)
def test_invalid_arguments(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
