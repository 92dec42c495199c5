"""Windows by index, by position and on a grid equal a comparison of all pairs."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.masks import causal, dilated_window, document, global_tokens, neighborhood, prefix_tree, sliding_window
from tests.support.random_masks import assert_canonical, documents, packed_rows

SIDES = st.none() | st.integers(0, 9)


def by_distance(query_positions, key_positions, left: int | None, right: int | None) -> torch.Tensor:
    """Dense window [B, Q, T]: `query - left <= key <= query + right`, None for no limit."""
    distance = key_positions[:, None, :] - query_positions[:, :, None]
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        visible &= distance >= -left
    if right is not None:
        visible &= distance <= right
    return visible


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), SIDES, SIDES)
def test_window_with_two_sides(rows: int, length: int, left: int | None, right: int | None) -> None:
    index = torch.arange(length).expand(rows, length)
    mask = sliding_window(rows, length, left=left, right=right)
    assert torch.equal(mask.to_dense(), by_distance(index, index, left, right))
    assert mask.intervals == 1
    assert_canonical(mask)


def test_forms_of_the_window() -> None:
    assert sliding_window(2, 9, 4).equal(sliding_window(2, 9, left=3))
    assert sliding_window(2, 9, window=4, right=0).equal(sliding_window(2, 9, 4))
    assert sliding_window(2, 9).equal(causal(2, 9))
    assert sliding_window(1, 9, left=10**12, right=10**12).visible_pairs().tolist() == [81]
    assert sliding_window(1, 9, left=0, right=None).equal(sliding_window(1, 9, left=0, right=8))
    assert sliding_window(1, 9, np.int64(4)).equal(sliding_window(1, 9, 4))
    assert sliding_window(1, 0, 3).shape == (1, 0, 0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_window_by_position_of_any_positions(data) -> None:
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 20))
    numbers = st.lists(st.integers(-3, 12), min_size=length, max_size=length)
    positions = torch.tensor([data.draw(numbers) for _ in range(rows)], dtype=torch.int32).view(rows, length)
    left, right = data.draw(SIDES), data.draw(SIDES)
    mask = sliding_window(rows, length, left=left, right=right, positions=positions)
    assert torch.equal(mask.to_dense(), by_distance(positions, positions, left, right))
    assert_canonical(mask)


@settings(max_examples=60, deadline=None)
@given(packed_rows(), st.integers(1, 8))
def test_window_by_position_of_documents_is_the_window_by_index(rows, window: int) -> None:
    same = document(rows.document_ids)
    by_position = sliding_window(*rows.shape, window, positions=rows.positions)
    assert (by_position & same).equal(sliding_window(*rows.shape, window) & same)


def test_intervals_of_a_window_by_position() -> None:
    """One interval for each run of positions that does not decrease; one for a document with repeated positions."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 2, 3, 4]])
    mask = sliding_window(1, 11, 2, positions=positions)
    assert mask.intervals == 3
    assert mask.start[0, 2:4].tolist() == [[1, 5, 8], [2, 6, 0]]
    assert mask.stop[0, 2:4].tolist() == [[3, 7, 9], [4, 10, 0]]
    image = torch.tensor([[0, 1, 1, 1, 2, 3]])
    assert sliding_window(1, 6, left=1, right=0, positions=image).start[0, :, 0].tolist() == [0, 0, 0, 0, 1, 4]
    assert sliding_window(1, 6, left=1, right=0, positions=image).intervals == 1


@pytest.mark.parametrize("window", [1, 2, 3, 4, 6, 20])
def test_window_by_position_on_a_tree(window: int) -> None:
    """Every document attends to the last `window` tokens of its path from the root, also across its ancestors."""
    parents = {0: 0, 1: 0, 2: 1, 3: 1, 4: 0, 5: 5, 6: 4}
    sizes = {0: 4, 1: 3, 2: 1, 3: 2, 4: 3, 5: 2, 6: 3}
    start = {0: 0}
    for child, parent in parents.items():
        start[child] = 0 if parent == child else start[parent] + sizes[parent]
    tokens = [(name, start[name] + i) for name, size in sizes.items() for i in range(size)] + [(-1, 0)] * 2

    def path(name: int) -> list[int]:
        return [name] if parents[name] == name else [*path(parents[name]), name]

    expected = torch.zeros(1, len(tokens), len(tokens), dtype=torch.bool)
    for (q, (document_q, position)), (kv, (document_kv, _)) in itertools.product(enumerate(tokens), repeat=2):
        if document_q >= 0 and document_kv in path(document_q):
            context = [token for token in tokens if token[0] in path(document_q) and token[1] <= position]
            expected[0, q, kv] = tokens[kv] in sorted(context, key=lambda token: token[1])[-window:]
    ids = torch.tensor([[name for name, _ in tokens]])
    parent_ids = torch.tensor([[parents.get(name, -1) for name, _ in tokens]])
    positions = torch.tensor([[position for _, position in tokens]])
    tree = prefix_tree(ids, parent_ids)
    mask = sliding_window(1, len(tokens), window, positions=positions) & tree & causal(1, len(tokens))
    assert torch.equal(mask.to_dense(), expected)

    # the same with a global token and a window on both sides: one expression
    is_global = torch.zeros_like(ids, dtype=torch.bool)
    is_global[0, 5] = True
    two_sided = sliding_window(1, len(tokens), left=window, right=1, positions=positions)
    distance = by_distance(positions, positions, window, 1)
    expected = (distance | is_global[:, None, :] | is_global[:, :, None]) & tree.to_dense()
    assert torch.equal(((global_tokens(is_global) | two_sided) & tree).to_dense(), expected)


def test_global_tokens_with_a_window_on_both_sides() -> None:
    is_global = torch.zeros(1, 24, dtype=torch.bool)
    is_global[:, [0, 11]] = True
    mask = global_tokens(is_global) | sliding_window(1, 24, left=3, right=2)
    index = torch.arange(24)[None]
    expected = by_distance(index, index, 3, 2) | is_global[:, None, :] | is_global[:, :, None]
    assert torch.equal(mask.to_dense(), expected)
    assert mask.intervals == 3  # two runs of global tokens and the window


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(1, 24), st.integers(1, 6), SIDES, SIDES)
def test_dilated_window(rows: int, length: int, dilation: int, left: int | None, right: int | None) -> None:
    index = torch.arange(length).expand(rows, length)
    remainder = (index[:, :, None] - index[:, None, :]) % dilation
    mask = dilated_window(rows, length, dilation, left=left, right=right)
    assert torch.equal(mask.to_dense(), by_distance(index, index, left, right) & (remainder == 0))
    assert_canonical(mask)


def test_intervals_of_a_dilated_window() -> None:
    assert dilated_window(1, 64, 3, left=12, right=7).intervals == 1 + 12 // 3 + 7 // 3
    assert dilated_window(1, 64, 1, left=12, right=7).intervals == 1
    assert dilated_window(1, 64, 4).intervals == 64 // 4
    assert (dilated_window(1, 64, 2, left=8) & document(documents(30, 34))).intervals == 5


def window_of(coordinate: int, size: int, kernel: int, stride: int, dilation: int, is_causal: bool) -> set[int]:
    """Keys of a coordinate in one dimension, by shifting the window of its stride group into the grid."""
    group = list(range(coordinate % dilation, size, dilation))  # tokens with the same remainder
    place = group.index(coordinate)
    block = range(place // stride * stride, place // stride * stride + stride)
    if is_causal:
        leader = min(block[-1], len(group) - 1)
        return {group[i] for i in range(max(0, leader - kernel + 1), place + 1)}
    leader = min(block[stride // 2], len(group) - 1)
    first = leader - kernel // 2
    while first < 0:
        first += 1
    while first + kernel > len(group):
        first -= 1
    return set(group[first : first + kernel])


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "dilation", "is_causal", "intervals"),
    [
        ((9,), 3, 1, 1, False, 1),
        ((5, 7), 3, 1, 1, False, 3),
        ((7, 5), (5, 3), 1, 1, False, 5),
        ((6, 6), (2, 4), 1, 1, False, 2),  # even
        ((1, 8), (1, 3), 1, 1, False, 1),
        ((4, 4), 4, 1, 1, False, 1),  # the whole grid
        ((7, 8), 3, 1, 2, False, 9),
        ((9, 8), (3, 3), 1, (3, 1), False, 3),
        ((6, 7), 3, 1, 1, (True, False), 3),
        ((6, 7), 3, 1, 1, True, 3),
        ((8, 7), 3, 1, 2, (False, True), 9),
        ((8, 9), (4, 3), (2, 3), 1, False, 4),
        ((8, 9), (4, 3), (4, 2), 1, True, 4),
        ((7, 11), 3, 2, (1, 3), (True, False), 9),
        ((3, 4, 5), (3, 3, 3), 1, 1, False, 9),
        ((4, 3, 4), (2, 3, 2), (1, 2, 2), (2, 1, 1), (True, False, False), 6),
        ((5, 1), (3, 1), 1, 1, False, 1),  # rows of one token: adjacent
    ],
)
def test_neighborhood(shape, kernel, stride, dilation, is_causal, intervals: int) -> None:
    mask = neighborhood(2, shape, kernel, stride=stride, dilation=dilation, is_causal=is_causal)
    each = [v if isinstance(v, tuple) else (v,) * len(shape) for v in (kernel, stride, dilation, is_causal)]
    cells = list(itertools.product(*map(range, shape)))
    expected = torch.zeros(len(cells), len(cells), dtype=torch.bool)
    for q, cell in enumerate(cells):
        windows = [window_of(x, *axis) for x, axis in zip(cell, zip(shape, *each, strict=True), strict=True)]
        expected[q] = torch.tensor([all(x in w for x, w in zip(key, windows, strict=True)) for key in cells])
    assert torch.equal(mask.to_dense(), expected.expand(2, -1, -1))
    assert mask.intervals == intervals
    assert_canonical(mask)


POSITIONS = torch.arange(4)[None]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: sliding_window(1, 4, 0), "window counts keys, the query included, .* at least 1; got 0"),
        (lambda: sliding_window(1, 4, 2.5), "got 2.5"),
        (lambda: sliding_window(1, 4, 2, left=1), "Give either window, or left and right"),
        (lambda: sliding_window(1, 4, 2, right=1), "window=2 with left=None and right=1"),
        (lambda: sliding_window(1, 4, left=-1), r"left counts the keys before the query \(None: no limit\).*got -1"),
        (lambda: sliding_window(1, 4, left=1, right=-2), "right counts the keys after the query.*got -2"),
        (lambda: sliding_window(2, 4, 2, positions=POSITIONS), r"positions have shape \(1, 4\); expected .*\(2, 4\)"),
        (lambda: sliding_window(1, 4, 2, positions=POSITIONS.float()), r"positions must be integers \[B, S\]"),
        (lambda: dilated_window(1, 4, 0), "dilation is a distance in keys .* got 0"),
        (lambda: dilated_window(1, 4, 2, left=-4), "left is a distance in keys before the query"),
        (lambda: neighborhood(1, (4, 4), 5), "needs 5 tokens, but a dimension of the grid has 4"),
        (lambda: neighborhood(1, (4, 4), 2, dilation=3), "kernel_size 2 with dilation 3 needs 6 tokens"),
        (lambda: neighborhood(1, (4, 4), 2, stride=3), "stride must be at most kernel_size 2; got 3"),
        (lambda: neighborhood(1, (4, 4), (3, 3, 3)), "kernel_size has 3 values.*2 dimensions"),
        (lambda: neighborhood(1, (4, 0), 3), "each dimension of shape .* got 0"),
        (lambda: neighborhood(1, 12, 3), "a tuple of one size for each dimension; got 12"),
        (lambda: neighborhood(1, (), 3), "each dimension of shape"),
        (lambda: neighborhood(1, (4, 4), 0), "kernel_size .* at least 1; got 0"),
    ],
)
def test_invalid_arguments(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
