"""The tokens of all documents: equal to those of single documents, and tokenized once."""

from pathlib import Path

import numpy as np
import pytest

from sightline.data import Documents, Tokenizer, tokens, train_tokenizer
from sightline.data.tokens import tokenize_documents

TEXTS = ["one", "two words and some more", "\n", "a" * 300, "é" * 7, "one", "<|end_of_text|> in a text"]
DOCUMENTS = Documents.from_texts(TEXTS)
TOKENIZER = train_tokenizer(DOCUMENTS, 280)


@pytest.mark.parametrize(("characters", "documents"), [(4_000_000, 4096), (30, 2), (1, 99)])
def test_documents_are_complete_and_in_order(
    characters: int, documents: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", characters)
    monkeypatch.setattr(tokens, "BATCH_DOCUMENTS", documents)
    tokenized = tokenize_documents(DOCUMENTS, TOKENIZER, tmp_path)
    assert len(tokenized) == len(TEXTS) and tokenized.tokens.dtype == np.uint16
    parts = np.split(tokenized.tokens, tokenized.offsets[1:-1])
    assert [part.tolist() for part in parts] == [TOKENIZER.encode(text) for text in TEXTS]


def test_ids_of_a_large_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "vocab_size", 2**16 + 1)
    assert tokenize_documents(DOCUMENTS, TOKENIZER, tmp_path).tokens.dtype == np.uint32


def test_equal_documents_are_tokenized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tokenize_documents(DOCUMENTS, TOKENIZER, tmp_path)
    monkeypatch.setattr(Tokenizer, "encode_all", None)
    again = tokenize_documents(Documents.from_texts(list(TEXTS), source="elsewhere"), TOKENIZER, tmp_path)
    assert np.array_equal(again.tokens, expected.tokens) and np.array_equal(again.offsets, expected.offsets)
    for documents, tokenizer in (
        (Documents.from_texts(TEXTS[::-1]), TOKENIZER),
        (DOCUMENTS, train_tokenizer(DOCUMENTS, 270)),
    ):
        with pytest.raises(TypeError):  # tokenizes
            tokenize_documents(documents, tokenizer, tmp_path)


def test_tokenizer_encodes_many_texts_like_one() -> None:
    assert TOKENIZER.encode_all(TEXTS) == [TOKENIZER.encode(text) for text in TEXTS]
