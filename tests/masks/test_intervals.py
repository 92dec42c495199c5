"""Operators on masks of many intervals: both ways to intersect, and blocks of queries that bound the memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.masks import AttentionMask
from sightline.masks import intervals as intervals_module
from tests.support.random_masks import assert_canonical


def random_mask(rows: int, queries: int, keys: int, seed: int, density: float) -> tuple[AttentionMask, torch.Tensor]:
    """A mask with runs at random, and its dense mask; some queries are fully masked and some attend to all keys."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(rows, queries, keys, generator=generator) < density
    dense[:, seed % 5 :: 5] = seed % 2 == 0
    return AttentionMask.from_dense(dense), dense


densities = st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 60)),
    st.integers(0, 2**31),
    st.integers(0, 2**31),
    densities,
    densities,
    st.sampled_from([1, 30, 2**20]),
)
def test_operators_on_many_intervals(shape, seed, other_seed, density, other_density, step) -> None:
    one, dense = random_mask(*shape, seed, density)
    two, other_dense = random_mask(*shape, other_seed, other_density)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals_module, "INTERVALS_PER_STEP", step)
        both, either = one & two, one | two
    for mask, expected in ((both, dense & other_dense), (either, dense | other_dense)):
        assert torch.equal(mask.to_dense(), expected)
        assert_canonical(mask)


def test_intersection_of_many_intervals_does_not_build_their_product(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []
    original = intervals_module.canonical

    def record(start, stop, key_length):
        widths.append(start.shape[2])
        return original(start, stop, key_length)

    monkeypatch.setattr(intervals_module, "canonical", record)
    index = torch.arange(600)
    even = AttentionMask.from_dense((index % 4 < 2).expand(1, 2, -1), max_intervals=150)
    thirds = AttentionMask.from_dense((index % 3 < 2).expand(1, 2, -1), max_intervals=200)
    both = even & thirds
    assert torch.equal(both.to_dense(), even.to_dense() & thirds.to_dense())
    assert max(widths) == 150 + 200 + 2
    widths.clear()
    few = AttentionMask.from_dense((index % 200 < 100).expand(1, 2, -1))
    assert few.intervals == 3 and (few & few).equal(few)
    assert widths == [9]


def test_one_interval_with_many_keeps_the_many() -> None:
    index = torch.arange(400)
    many = AttentionMask.from_dense((index % 2 == 0).expand(1, 3, -1), max_intervals=200)
    window = AttentionMask.from_intervals(torch.tensor([[[100]] * 3]), torch.tensor([[[201]] * 3]), 400)
    assert (many & window).intervals == 51
    assert torch.equal((many & window).to_dense(), many.to_dense() & window.to_dense())
    assert (many | window).intervals == 50 + 1 + 99
