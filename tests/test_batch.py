import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline import Batch

documents = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=30), min_size=1, max_size=12)


def test_two_documents() -> None:
    batch = Batch.from_documents([[1, 2, 3], [4, 5]], length=8)
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
    assert batch.labels.tolist() == [[2, 3, -100, 5, -100, -100, -100, -100]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, -1, -1, -1]]
    assert batch.positions.tolist() == [[0, 1, 2, 0, 1, 0, 0, 0]]
    assert (batch.tokens.dtype, batch.labels.dtype) == (torch.int64, torch.int64)
    assert (batch.document_ids.dtype, batch.positions.dtype) == (torch.int32, torch.int32)
    assert batch.valid_tokens() == 3 and batch.fill() == 5 / 8


def test_long_document_continues_in_the_next_row() -> None:
    batch = Batch.from_documents([[9], [1, 2, 3, 4, 5, 6, 7]], length=3)
    assert batch.tokens.tolist() == [[9, 1, 2], [3, 4, 5], [6, 7, 0]]
    assert batch.labels.tolist() == [[-100, 2, 3], [4, 5, 6], [7, -100, -100]]  # row boundaries lose no labels
    assert batch.document_ids.tolist() == [[0, 1, 1], [0, 0, 0], [0, 0, -1]]
    assert batch.positions.tolist() == [[0, 0, 1], [2, 3, 4], [5, 6, 0]]


@settings(max_examples=100, deadline=None)
@given(documents, st.integers(2, 20))
def test_all_tokens_are_packed_and_labels_stay_in_their_document(texts, length) -> None:
    batch = Batch.from_documents(texts, length=length)
    real = batch.document_ids >= 0
    assert batch.tokens[real].tolist() == [token for text in texts for token in text]
    assert batch.labels[real].tolist() == [label for text in texts for label in [*text[1:], -100]]
    assert batch.positions[real].tolist() == [position for text in texts for position in range(len(text))]
    assert (batch.labels[~real] == -100).all() and (batch.positions[~real] == 0).all()
    assert real[:-1].all(), "only the last row may be padded"


@settings(max_examples=60, deadline=None)
@given(documents, st.integers(2, 20))
def test_document_offsets_reset_state_at_document_starts(texts, length) -> None:
    """A cumulative sum that restarts at every offset equals the cumulative sum of each document in its row."""
    batch = Batch.from_documents(texts, length=length)
    offsets = batch.document_offsets()
    assert offsets.dtype == torch.int32 and offsets[0] == 0 and offsets[-1] == batch.tokens.numel()
    flat = batch.tokens.flatten()
    by_offsets = torch.cat([segment.cumsum(0) for segment in flat.split(offsets.diff().tolist())]).view(batch.shape)
    for row in range(batch.shape[0]):
        for document in batch.document_ids[row].unique():
            inside = batch.document_ids[row] == document
            assert torch.equal(by_offsets[row][inside], batch.tokens[row][inside].cumsum(0))


def test_selecting_rows_includes_extra() -> None:
    batch = Batch.from_documents([[1, 2, 3, 4, 5]], length=2)
    batch = Batch(
        tokens=batch.tokens, labels=batch.labels, document_ids=batch.document_ids, positions=batch.positions,
        extra={"pixels": torch.arange(3)},
    )  # fmt: skip
    last = batch[2:]
    assert last.tokens.tolist() == [[5, 0]] and last.extra["pixels"].tolist() == [2]
    assert last.to("cpu").extra["pixels"].tolist() == [2]


@pytest.mark.parametrize(
    ("texts", "length", "text"),
    [
        ([[1]], 1, "at least 2 tokens .* got length=1"),
        ([[1], []], 4, "document 1 is empty"),
        ([], 4, "no documents"),
    ],
)
def test_invalid_documents_raise(texts, length: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Batch.from_documents(texts, length=length)


def test_different_shapes_raise() -> None:
    batch = Batch.from_documents([[1, 2]], length=4)
    with pytest.raises(ValueError, match=r"labels must have the shape of tokens \(1, 4\), got \(1, 3\)"):
        Batch(
            tokens=batch.tokens, labels=batch.labels[:, :3], document_ids=batch.document_ids, positions=batch.positions
        )
