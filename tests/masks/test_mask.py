import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from sightline.masks import AttentionMask, causal, document, sliding_window
from tests.support.random_masks import assert_canonical, expressions


@settings(max_examples=200, deadline=None)
@given(expressions())
def test_expressions_equal_their_dense_mask_and_are_canonical(pair) -> None:
    mask, dense = pair
    assert torch.equal(mask.to_dense(), dense)
    assert torch.equal(mask.visible_pairs(), dense.sum(dim=(1, 2)))
    assert_canonical(mask)


@settings(max_examples=100, deadline=None)
@given(expressions())
def test_equal_masks_have_equal_tensors(pair) -> None:
    mask, dense = pair
    assert AttentionMask.from_dense(dense).equal(mask)
    assert (mask | mask).equal(mask) and (mask & mask).equal(mask)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**31))
def test_from_dense_of_random_masks(rows, queries, keys, seed) -> None:
    dense = torch.rand(rows, queries, keys, generator=torch.Generator().manual_seed(seed)) < 0.4
    mask = AttentionMask.from_dense(dense)
    assert torch.equal(mask.to_dense(), dense)
    assert_canonical(mask)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_from_intervals_of_random_intervals(seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(-3, 14, (2, 5, 4), generator=generator)
    stop = torch.randint(-3, 14, (2, 5, 4), generator=generator)
    keys = torch.arange(10)
    expected = ((keys >= start[..., None]) & (keys < stop[..., None])).any(dim=2)
    mask = AttentionMask.from_intervals(start, stop, 10)
    assert torch.equal(mask.to_dense(), expected)
    assert_canonical(mask)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_to_dense_by_its_definition(seed, width) -> None:
    """Intervals that are not canonical are read by the definition too: `validate` refuses them, `to_dense` does not."""
    generator = torch.Generator().manual_seed(seed)
    start, stop = torch.randint(-3, 14, (2, 2, 5, width), generator=generator, dtype=torch.int32)
    keys = torch.arange(10)
    expected = ((keys >= start[..., None]) & (keys < stop[..., None])).any(dim=2)
    assert torch.equal(AttentionMask(start, stop, 10).to_dense(), expected)


def test_from_mask_mod_evaluates_every_pair_in_chunks() -> None:
    def window_without_distance_ten(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < 20 + b) & (q_idx - kv_idx != 10)

    mask = AttentionMask.from_mask_mod(window_without_distance_ten, 2, 2500, 2500)  # two chunks of queries
    index = torch.arange(2500)
    distance = index[:, None] - index
    for row in range(2):
        expected = (distance >= 0) & (distance < 20 + row) & (distance != 10)
        assert torch.equal(mask[row].to_dense()[0], expected)


def test_from_mask_mod_accepts_constant_results() -> None:
    full = AttentionMask.from_mask_mod(lambda b, h, q, kv: torch.tensor(True), 2, 3, 5)
    assert full.visible_pairs().tolist() == [15, 15]


def test_too_many_intervals_error_states_the_number() -> None:
    dense = (torch.arange(20) % 2 == 0).expand(1, 3, 20)
    with pytest.raises(ValueError, match=r"needs K=10 .*max_intervals=4.*max_intervals=10"):
        AttentionMask.from_dense(dense, max_intervals=4)


@settings(max_examples=60, deadline=None)
@given(expressions(), st.data())
def test_selecting_queries_and_rows(pair, data) -> None:
    mask, dense = pair
    rows, queries, _ = mask.shape
    index = torch.tensor(data.draw(st.lists(st.integers(0, queries - 1), min_size=1, max_size=20)))
    selected = mask.take_queries(index)
    assert torch.equal(selected.to_dense(), dense[:, index])
    assert_canonical(selected)
    each = torch.randint(0, queries, (rows, 5))
    assert torch.equal(mask.take_queries(each).to_dense(), dense[torch.arange(rows)[:, None], each])
    row = data.draw(st.integers(0, rows - 1))
    assert torch.equal(mask[row].to_dense(), dense[row : row + 1])
    assert torch.equal(mask[row:].to_dense(), dense[row:])
    assert_canonical(mask[torch.tensor([row])])


def test_invalid_selections() -> None:
    with pytest.raises(ValueError, match=r"\[B, Q'\] with B=2"):
        causal(2, 4).take_queries(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(IndexError, match="row 5"):
        causal(2, 4)[5]


def test_mask_mod_equals_the_dense_mask() -> None:
    mask = (sliding_window(1, 12, 3) & document(torch.tensor([[0] * 5 + [1] * 7]))) | AttentionMask.from_dense(
        torch.eye(12, dtype=torch.bool).roll(-4, dims=1)[None]
    )
    index = torch.arange(12)
    zero = torch.zeros((), dtype=torch.int64)
    assert torch.equal(mask.mask_mod(zero, zero, index[:, None], index[None, :]), mask.to_dense()[0])


def test_a_mask_is_a_pytree_of_tensors_with_the_batch_dimension_first() -> None:
    mask = causal(4, 6)
    leaves, spec = pytree.tree_flatten({"full": mask})
    assert [tuple(leaf.shape) for leaf in leaves] == [(4, 6, 1), (4, 6, 1)]
    halves = [pytree.tree_unflatten([leaf.chunk(2)[i] for leaf in leaves], spec)["full"] for i in range(2)]
    assert all(half.equal(causal(2, 6)) for half in halves)
    assert pytree.tree_map(lambda x: None, mask).start is None


def test_empty_shapes() -> None:
    assert causal(0, 4).to_dense().shape == (0, 4, 4)
    assert (causal(0, 4) | causal(0, 4)).visible_pairs().tolist() == []
    assert causal(2, 0).visible_pairs().tolist() == [0, 0]
