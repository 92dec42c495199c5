import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.masks import (
    AttentionMask,
    and_masks,
    block_diffusion,
    causal,
    chunked,
    document,
    global_tokens,
    or_masks,
    prefix_lm,
    prefix_tree,
    shared_prefix,
    sliding_window,
)
from tests.support.random_masks import assert_canonical, dense_rules, packed_rows


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


@settings(max_examples=150, deadline=None)
@given(packed_rows(), st.integers(1, 12), st.integers(1, 12))
def test_rules_equal_their_dense_definitions(rows, window, chunk) -> None:
    for name, (mask, dense) in dense_rules(rows, window, chunk).items():
        assert torch.equal(mask.to_dense(), dense), name
        assert_canonical(mask)


def test_intervals_of_causal_and_window_over_documents() -> None:
    packed = causal(1, 7) & document(ids([0, 0, 0, 1, 1, 1, 1]))
    assert packed.start[0, :, 0].tolist() == [0, 0, 0, 3, 3, 3, 3]
    assert packed.stop[0, :, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]
    window = sliding_window(1, 7, 2) & document(ids([0, 0, 0, 1, 1, 1, 1]))
    assert window.start[0, :, 0].tolist() == [0, 0, 1, 3, 3, 4, 5]
    assert window.stop[0, :, 0].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_window_includes_the_query() -> None:
    assert sliding_window(1, 9, 4).visible_pairs().tolist() == [1 + 2 + 3 + 4 * 6]


def test_chunks_start_at_each_document() -> None:
    positions = ids([0, 1, 2, 0, 1, 2, 3, 4])
    mask = chunked(positions, 2)
    assert mask.start[0, :, 0].tolist() == [0, 0, 2, 3, 3, 5, 5, 7]
    assert mask.stop[0, :, 0].tolist() == [2, 2, 3, 5, 5, 7, 7, 8]


def test_a_continued_document_keeps_its_chunks_and_prefix() -> None:
    positions = ids([3, 4, 5, 6, 0, 1])  # the first document started three tokens before the row
    mask = chunked(positions, 4)
    assert mask.start[0, :, 0].tolist() == [0, 1, 1, 1, 4, 4]
    prefix = prefix_lm(positions, ids([5, 5, 5, 5, 1, 1]))
    assert prefix.stop[0, :, 0].tolist() == [2, 2, 2, 2, 5, 5]


def test_a_document_may_have_several_runs() -> None:
    values = ids([7, 7, 5, 5, 7])
    assert torch.equal(document(values).to_dense(), values[:, :, None] == values[:, None, :])
    assert document(values).intervals == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=30))
def test_document_of_random_ids(numbers) -> None:
    values = ids(numbers)
    expected = (values[:, :, None] == values[:, None, :]) & (values >= 0)[:, :, None]
    mask = document(values)
    assert torch.equal(mask.to_dense(), expected)
    assert_canonical(mask)


def test_cross_attention() -> None:
    queries, keys = ids([0, 0, 1, -1, 9]), ids([0, 1, 1, -1])
    expected = (queries[:, :, None] == keys[:, None, :]) & (queries >= 0)[:, :, None]
    mask = document(queries, keys)
    assert mask.shape == (1, 5, 4)
    assert torch.equal(mask.to_dense(), expected)


def test_global_and_window_need_two_intervals() -> None:
    is_global = torch.zeros(1, 32, dtype=torch.bool)
    is_global[:, :2] = True
    mask = (global_tokens(is_global) | sliding_window(1, 32, 4)) & causal(1, 32)
    assert mask.intervals == 2
    assert mask.start[0, 20].tolist() == [0, 17]
    assert mask.stop[0, 20].tolist() == [2, 21]


def test_shared_prefix_has_two_intervals_and_isolates_responses() -> None:
    documents = ids([0, 0, 0, 1, 1, 2, 2, -1])
    mask = shared_prefix(documents, ids([0, 0, 0, 0, 0, 0, 0, -1])) & causal(1, 8)
    assert mask.start[0].tolist() == [[0, 0], [0, 0], [0, 0], [0, 0], [0, 0], [0, 5], [0, 5], [0, 0]]
    assert mask.stop[0].tolist() == [[1, 0], [2, 0], [3, 0], [4, 0], [5, 0], [3, 6], [3, 7], [0, 0]]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_prefix_tree(data) -> None:
    parents, documents, number = [], [], 0
    while len(documents) < 30:
        parent = data.draw(st.integers(0, number), label="parent")
        size = data.draw(st.integers(1, 6), label="size")
        documents += [number] * size
        parents += [parent] * size
        number += 1
    documents += [-1, -1]
    parents += [-1, -1]
    parent_of = dict(zip(documents, parents, strict=True))

    def visible(query: int, key: int) -> bool:
        ancestor = documents[query]
        while ancestor >= 0:
            if documents[key] == ancestor:
                return True
            if parent_of[ancestor] == ancestor:
                return False
            ancestor = parent_of[ancestor]
        return False

    expected = torch.tensor([[visible(q, kv) for kv in range(len(documents))] for q in range(len(documents))])
    mask = prefix_tree(ids(documents), ids(parents))
    assert torch.equal(mask.to_dense()[0], expected)
    assert_canonical(mask)


def test_prefix_tree_rejects_cycles_and_unknown_parents() -> None:
    with pytest.raises(ValueError, match="cycle"):
        prefix_tree(ids([0, 0, 1, 1]), ids([1, 1, 0, 0]))
    with pytest.raises(ValueError, match="not in document_ids of the row"):
        prefix_tree(ids([0, 0, 1, 1]), ids([0, 0, 7, 7]))


@pytest.mark.parametrize("block", [1, 2, 3, 5, 100])
def test_block_diffusion(block: int) -> None:
    # noisy copy 0 and its clean copy 1, then noisy 2 and clean 3, then padding
    documents = ids([0] * 7 + [1] * 7 + [2] * 4 + [3] * 4 + [-1] * 2)
    clean = ids([1] * 14 + [3] * 8 + [-1] * 2)
    positions = ids([*range(7), *range(7), *range(4), *range(4), 0, 0])
    number = positions // block
    doc_q, doc_kv = documents[:, :, None], documents[:, None, :]
    expected = (doc_q == doc_kv) & (number[:, :, None] == number[:, None, :])
    expected |= (clean[:, :, None] == doc_kv) & (number[:, None, :] < number[:, :, None])
    expected &= (doc_q >= 0) & (doc_kv >= 0)
    mask = block_diffusion(documents, clean, positions, block)
    assert torch.equal(mask.to_dense(), expected)
    assert mask.intervals <= 2
    assert_canonical(mask)


def test_and_masks_and_or_masks() -> None:
    documents = ids([0, 0, 1, 1])
    one, two, three = causal(1, 4), document(documents), sliding_window(1, 4, 1)
    assert and_masks(one, two, three).equal(one & two & three)
    assert or_masks(one, two, three).equal(one | two | three)
    assert and_masks(one).equal(one)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: sliding_window(1, 4, 0), "window"),
        (lambda: chunked(ids([0, 1]), 0), "chunk"),
        (lambda: document(torch.zeros(4)), r"integers \[B, S\]"),
        (lambda: prefix_lm(ids([0, 1]), ids([0, 1, 2])), "prefix_lengths"),
        (lambda: and_masks(), "at least one"),
        (lambda: causal(1, 4) & causal(2, 4), "different shape"),
        (lambda: causal(1, 4) | causal(1, 5), "different shape"),
        (lambda: document(ids([0, 1]), ids([0, 1], [0, 1])), "rows of keys"),
        (lambda: AttentionMask(torch.zeros(2, 3), torch.zeros(2, 3), 4), "int32"),
    ],
)
def test_invalid_arguments(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
