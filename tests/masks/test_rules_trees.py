"""Trees of tokens and tables of documents equal a comparison of all pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline.masks import causal, document, document_visibility, token_tree
from tests.support.random_masks import assert_canonical, documents


def ancestors(parents: list[int], token: int) -> set[int]:
    """The token and its ancestors; none for padding."""
    if parents[token] < -1:
        return set()
    return {token} if parents[token] == -1 else {token} | ancestors(parents, parents[token])


@st.composite
def trees(draw: st.DrawFn, length: int) -> list[int]:
    """Parents of a tree in which some tokens follow their parent, some branch off, and some are padding."""
    parents: list[int] = []
    for token in range(length):
        earlier = [p for p in range(token) if parents[p] >= -1]
        kind = draw(st.sampled_from(["chain", "chain", "branch", "root", "padding"]))
        if kind == "chain" and token - 1 in earlier:
            parents.append(token - 1)
        elif kind == "branch" and earlier:
            parents.append(draw(st.sampled_from(earlier)))
        else:
            parents.append(-2 if kind == "padding" else -1)
    return parents


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_token_tree(data) -> None:
    rows, length, context = (data.draw(st.integers(least, most)) for least, most in ((1, 3), (1, 16), (0, 4)))
    parents = [data.draw(trees(length)) for _ in range(rows)]
    expected = torch.zeros(rows, length, context + length, dtype=torch.bool)
    for row in range(rows):
        for token in range(length):
            path = ancestors(parents[row], token)
            expected[row, token, :context] = bool(path)
            expected[row, token, [context + ancestor for ancestor in path]] = True
    mask = token_tree(torch.tensor(parents), context)
    assert torch.equal(mask.to_dense(), expected)
    assert_canonical(mask)


def test_intervals_of_a_token_tree() -> None:
    """A draft of one branch continues the context; each branch that starts later adds an interval."""
    chain = torch.arange(-1, 5)[None]
    assert token_tree(chain, 10).equal(causal(1, 16).take_queries(torch.arange(10, 16)))
    assert token_tree(chain).equal(causal(1, 6))
    # 0 - 1 - 2
    #  \    \- 3 - 4
    #   \- 5
    tree = token_tree(torch.tensor([[-1, 0, 1, 1, 3, 0]]), 10)
    assert tree.intervals == 2
    assert tree.start[0].tolist() == [[0, 0], [0, 0], [0, 0], [0, 13], [0, 13], [0, 15]]
    assert tree.stop[0].tolist() == [[11, 0], [12, 0], [13, 0], [12, 14], [12, 15], [11, 16]]
    assert token_tree(torch.zeros(2, 0, dtype=torch.int32), 3).shape == (2, 0, 3)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_document_visibility(data) -> None:
    rows, queries, keys = (data.draw(st.integers(1, most)) for most in (3, 16, 16))
    many, others = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))

    def ids(length: int, number: int) -> torch.Tensor:
        row = st.lists(st.integers(-1, number - 1), min_size=length, max_size=length)
        return torch.tensor([data.draw(row) for _ in range(rows)], dtype=torch.int32)

    query_ids, key_ids = ids(queries, many), ids(keys, others)
    cells = st.lists(st.booleans(), min_size=rows * many * others, max_size=rows * many * others)
    visible = torch.tensor(data.draw(cells)).view(rows, many, others)
    expected = torch.zeros(rows, queries, keys, dtype=torch.bool)
    for row in range(rows):
        for q, of_query in enumerate(query_ids[row].tolist()):
            for kv, of_key in enumerate(key_ids[row].tolist()):
                expected[row, q, kv] = min(of_query, of_key) >= 0 and bool(visible[row, of_query, of_key])
    mask = document_visibility(query_ids, visible, key_ids)
    assert torch.equal(mask.to_dense(), expected)
    assert_canonical(mask)
    assert document_visibility(query_ids, visible.int(), key_ids).equal(mask)


def test_visibility_of_retrieved_passages() -> None:
    """Passages 0 to 3 attend to themselves; question 4 attends to passages 0, 1 and 3: two groups, then itself."""
    ids = documents(2, 3, 1, 2, 2, padding=1)
    table = torch.eye(5, dtype=torch.bool)[None]
    assert document_visibility(ids, table).equal(document(ids))
    table[0, 4, [0, 1, 3]] = True
    mask = document_visibility(ids, table) & causal(*ids.shape)
    assert mask.intervals == 2
    assert mask.start[0, 8:].tolist() == [[0, 6], [0, 6], [0, 0]]
    assert mask.stop[0, 8:].tolist() == [[5, 9], [5, 10], [0, 0]]
    assert document_visibility(ids[:, :0], table).shape == (1, 0, 0)
    only_padding = torch.full_like(ids, -1)
    assert document_visibility(only_padding, table.flip(1), ids).intervals == 1


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: token_tree(torch.tensor([[-1, 1]])), "parent of token 1 in row 0 is 1; .* parents come first"),
        (lambda: token_tree(torch.tensor([[-1, 0], [1, -1]])), "parent of token 0 in row 1 is 1; .*earlier token"),
        (lambda: token_tree(torch.tensor([[-2, 0]])), "parent of token 1 in row 0 is 0; .*not padding"),
        (lambda: token_tree(torch.tensor([[-1, 0]]), -3), "context_length .* got -3"),
        (lambda: token_tree(torch.tensor([-1, 0])), r"parents must be integers \[B, S\]"),
        (lambda: document_visibility(documents(2, 2), torch.ones(2, 2)), r"visible must be bool \[B, N, M\]"),
        (lambda: document_visibility(documents(2, 2), torch.ones(1, 2, 2)), "torch.float32"),
        (lambda: document_visibility(documents(2, 2), torch.ones(2, 2, 2).bool()), "1 rows of keys and 2 tables"),
        (
            lambda: document_visibility(documents(2, 2, 1), torch.ones(1, 2, 3).bool()),
            "document_ids contains 2, but the table has 2 documents, 0 to 1",
        ),
        (
            lambda: document_visibility(documents(2, 2), torch.ones(1, 2, 2).bool(), documents(1, 1, 1)),
            "key_document_ids contains 2",
        ),
    ],
)
def test_invalid_arguments(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
