"""Byte-level BPE: lossless, deterministic, and text is never encoded as a document boundary."""

import json
import os
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from sightline.data import Documents, Tokenizer, load_tokenizer, tokenizer, train_tokenizer

FOLDER = Path(os.__file__).parent
STDLIB = """abc ast bdb bisect calendar cmd code copy csv dis
            enum glob gzip heapq io json/decoder os queue re/_parser"""
TEXTS = Documents.from_texts([Path(FOLDER, f"{name}.py").read_text(encoding="utf-8") for name in STDLIB.split()])
TRAINED = train_tokenizer(TEXTS, 1000)
BEGIN, END = TRAINED.bos_id, TRAINED.eos_id
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>"]


def byte_level(*specials: AddedToken | str) -> tokenizers.Tokenizer:
    """Return a Hugging Face tokenizer of single bytes without merges, followed by special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={sign: id for id, sign in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([token for token in specials if isinstance(token, AddedToken)])
    backend.add_special_tokens([token for token in specials if isinstance(token, str)])
    return backend


def saved(folder: Path, backend: tokenizers.Tokenizer, **config: object) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


@given(st.text())
def test_decode_inverts_encode(text: str) -> None:
    ids = TRAINED.encode(text)
    assert (ids[0], ids[-1]) == (BEGIN, END)
    assert ids[:-1] == TRAINED.encode_prompt(text)
    assert not {BEGIN, END} & set(ids[1:-1])
    assert TRAINED.decode(ids) == text
    assert max(ids) < TRAINED.vocab_size


@given(st.lists(st.sampled_from([*SPECIAL, "a", " ", "\n", "<|", "|>"])).map("".join))
def test_special_tokens_in_a_text_are_text(text: str) -> None:
    ids = TRAINED.encode(text)
    assert (ids.count(BEGIN), ids.count(END)) == (1, 1)
    assert TRAINED.decode(ids) == text


def test_decode_inverts_encode_for_the_standard_library() -> None:
    for text in TEXTS:
        assert TRAINED.decode(TRAINED.encode(text)) == text


def test_training_is_deterministic_and_compresses() -> None:
    other = train_tokenizer(TEXTS, 1000)
    assert other.fingerprint == TRAINED.fingerprint
    assert TRAINED.vocab_size == 1000
    smaller = train_tokenizer(TEXTS, 500)
    assert smaller.fingerprint != TRAINED.fingerprint
    sizes = [len(each.encode(TEXTS[0])) for each in (TRAINED, smaller)]
    assert sizes[0] < sizes[1] < len(TEXTS[0].encode()) / 1.5


def test_small_text_gives_small_vocabulary() -> None:
    assert train_tokenizer(Documents.from_texts(["ab"]), 8192).vocab_size == 258
    assert train_tokenizer(Documents.from_texts(["ab", "ab"]), 8192).vocab_size == 259
    assert train_tokenizer(Documents.from_texts(["ab", "ab"]), 258).vocab_size == 258
    with pytest.raises(ValueError, match=r"vocabulary of 257 tokens is too small.*at least 258"):
        train_tokenizer(TEXTS, 257)


def test_large_source_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = Documents.from_texts(["aa aa aa", "bb bb bb", "cc cc cc", "dd dd dd"])
    monkeypatch.setattr(tokenizer, "TRAINING_CHARACTERS", 17)  # of 32 characters: every second document
    sampled, every_second = train_tokenizer(documents, 300), Documents.from_texts(["aa aa aa", "cc cc cc"])
    assert sampled.fingerprint == train_tokenizer(every_second, 300).fingerprint


def test_saved_and_loaded_tokenizer_is_the_same(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "new" / "tokenizer.json")
    for path in (tmp_path / "new" / "tokenizer.json", tmp_path / "new"):
        loaded = load_tokenizer(path)
        assert loaded.fingerprint == TRAINED.fingerprint
        assert loaded.encode("a <|end_of_text|> é") == TRAINED.encode("a <|end_of_text|> é")


@pytest.mark.parametrize(
    ("specials", "begin", "end"),
    [
        (["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"], "<|begin_of_text|>", "<|end_of_text|>"),
        (["<s>", "</s>"], "<s>", "</s>"),
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|endoftext|>"),
        (["<|im_start|>", "<|im_end|>"], None, "<|im_end|>"),
    ],
)
def test_begin_and_end_are_found_by_name(tmp_path: Path, specials: list[str], begin: str | None, end: str) -> None:
    backend = byte_level(*specials)
    loaded = load_tokenizer(saved(tmp_path, backend))
    assert loaded.bos_id == (None if begin is None else backend.token_to_id(begin))
    assert loaded.eos_id == backend.token_to_id(end)
    ids = loaded.encode(f"x{end}")
    assert len(ids) == 1 + len(end) + 1 + (begin is not None)
    assert loaded.decode(ids) == f"x{end}"


def test_config_names_begin_and_end(tmp_path: Path) -> None:
    backend = byte_level("<s>", "</s>", "<stop>")
    loaded = load_tokenizer(saved(tmp_path, backend, bos_token=None, eos_token={"content": "<stop>"}))
    assert loaded.bos_id is None
    assert loaded.encode("") == [backend.token_to_id("<stop>")]
    loaded.save(tmp_path / "saved" / "tokenizer.json")
    assert load_tokenizer(tmp_path / "saved").encode("a</s>") == loaded.encode("a</s>")


def test_special_token_not_marked_as_special_is_not_encoded_in_a_text(tmp_path: Path) -> None:
    loaded = load_tokenizer(saved(tmp_path, byte_level(AddedToken("</s>", special=False))))
    assert loaded.encode("</s>").count(loaded.eos_id) == 1
    assert loaded.decode(loaded.encode("</s>")) == "</s>"


def test_truncation_and_padding_of_a_file_are_ignored(tmp_path: Path) -> None:
    backend = byte_level("</s>")
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    assert len(load_tokenizer(saved(tmp_path, backend)).encode("abcdef")) == 7
    assert len(load_tokenizer(saved(tmp_path, backend)).encode("a")) == 2


def test_vocab_size_includes_gaps() -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 300}, merges=[]))
    gappy = Tokenizer(backend, begin=None, end="</s>")
    assert backend.get_vocab_size() == 3
    assert gappy.encode("b")[0] == 300
    assert gappy.vocab_size == 301


def test_invalid_files_raise(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer at .*nowhere\.json"):
        load_tokenizer(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match=r"no tokenizer at .*tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="is not a Hugging Face tokenizer"):
        load_tokenizer(tmp_path / "other.json")
    with pytest.raises(
        ValueError, match=r"no token that ends a document; expected one of .*</s>.*tokenizer_config\.json"
    ):
        load_tokenizer(saved(tmp_path, byte_level("<s>")))
    with pytest.raises(ValueError, match="names eos_token '<stop>', which is not in"):
        load_tokenizer(saved(tmp_path, byte_level("</s>"), eos_token="<stop>"))


def test_tokenizer_that_encodes_text_as_its_end_token_raises() -> None:
    """A word-level vocabulary contains `</s>` as an ordinary word."""
    backend = tokenizers.Tokenizer(models.WordLevel(vocab={"</s>": 0, "<unk>": 1}, unk_token="<unk>"))
    with pytest.raises(ValueError, match="'</s>' as its special token"):
        Tokenizer(backend, begin=None, end="</s>")
