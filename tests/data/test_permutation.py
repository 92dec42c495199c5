"""Keyed permutations: every element once, another order for another key, no visible structure."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sightline.data.permutation import Permutation


@given(st.integers(1, 5000), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3))
def test_every_number_occurs_once(size: int, key: list[int]) -> None:
    order = Permutation(size, *key)(np.arange(size))
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(size))


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 4095, 4096, 4097])
def test_sizes_around_powers_of_two(size: int) -> None:
    assert sorted(Permutation(size, 1)(np.arange(size)).tolist()) == list(range(size))


def test_an_element_does_not_depend_on_the_others() -> None:
    permutation = Permutation(10**12, 5, 3)
    index = np.array([[0, 7], [10**12 - 1, 10**11]])
    expected = [[int(permutation(np.array([i]))[0]) for i in row] for row in index.tolist()]
    assert permutation(index).tolist() == expected
    assert index.tolist() == [[0, 7], [10**12 - 1, 10**11]], "the argument is not changed"


def test_the_order_is_fixed_for_all_versions_and_machines() -> None:
    """A resumed run continues the order that it began."""
    assert Permutation(10, 0, 0, 1)(np.arange(10)).tolist() == [3, 4, 5, 2, 1, 7, 6, 8, 0, 9]
    assert Permutation(2**40, 7, 2, 2)(np.arange(3)).tolist() == [593342509030, 198379819394, 972630504128]


def test_another_key_is_another_order() -> None:
    orders = {tuple(Permutation(50, seed, epoch, 2)(np.arange(50)).tolist()) for seed in range(9) for epoch in range(9)}
    assert len(orders) == 81


def test_positions_and_neighbors_are_uniform() -> None:
    """Over many keys, each element is at each position equally often, and so is each pair at the first two."""
    size, keys = 12, 6000
    orders = np.stack([Permutation(size, key, 1)(np.arange(size)) for key in range(keys)])
    positions = np.bincount((orders * size + np.arange(size)).ravel())
    pairs = np.bincount(orders[:, 0] * size + orders[:, 1], minlength=size * size)
    pairs = pairs.reshape(size, size)[~np.eye(size, dtype=bool)]
    for counts, expected in ((positions, keys / size), (pairs, keys / (size * (size - 1)))):
        assert abs(counts - expected).max() < 4.5 * expected**0.5
