"""Tokenizers: a byte-level BPE trained on the documents, or any Hugging Face `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
import reprlib
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sightline.data.documents import Documents
from sightline.paths import file_inside, read_json

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
BYTES = 256  # the alphabet of a byte-level BPE, which can encode and decode any text without loss
BEGIN_NAMES = (BEGIN, "<s>", "<bos>", "<|startoftext|>")
END_NAMES = (END, "</s>", "<eos>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>")
"""Searched in this order if no tokenizer_config.json names the tokens that begin and end a document."""
MAX_BYTES = 2**28  # of a tokenizer.json; that of Gemma 3, with 262,144 tokens, has 33 MB
TRAINING_CHARACTERS = 200_000_000  # characters; more of them make training slower, not better


class Tokenizer:
    """Encodes a document as [begin] + text + [end], without a begin token if the vocabulary has none.

    Special tokens in the text are encoded as ordinary text: `<|end_of_text|>` in a document does not end it.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, begin: str | None, end: str) -> None:
        self._backend = backend
        self._begin, self._end = begin, end
        # Only tokens marked as special are kept out of the text, and some files do not mark them.
        backend.add_special_tokens([name for name in (begin, end) if name is not None])
        backend.encode_special_tokens = True  # despite its name: encode special tokens in the text as text
        # Some files enable truncation or padding, but documents must stay complete.
        backend.no_truncation()
        backend.no_padding()
        self.bos_id: int | None = None if begin is None else backend.token_to_id(begin)
        end_id = backend.token_to_id(end)
        assert end_id is not None
        self.eos_id: int = end_id
        for name in (begin, end):
            if name is not None and backend.token_to_id(name) in self._encode_text(name):
                raise ValueError(
                    f"this tokenizer encodes the text {name!r} as its special token, so a document could contain a "
                    "false document boundary; use a byte-level BPE tokenizer"
                )

    @property
    def vocab_size(self) -> int:
        """Minimum number of rows of an embedding: the largest id + 1, because ids may have gaps."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that affects the encoding; saving and loading do not change it."""
        content = self._backend.to_str() + f"\0{self._begin}\0{self._end}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a complete document: [begin] + text + [end]."""
        return [*self.encode_prompt(text), self.eos_id]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of complete documents, which are encoded in parallel."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        begin = [] if self.bos_id is None else [self.bos_id]
        return [[*begin, *encoding.ids, self.eos_id] for encoding in encoded]

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of the beginning of a document: [begin] + text."""
        ids = self._encode_text(text)
        return ids if self.bos_id is None else [self.bos_id, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Save a tokenizer.json at `path`, and next to it a tokenizer_config.json with the begin and end tokens."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self._backend.to_str(pretty=True), encoding="utf-8")  # `save` takes only paths in UTF-8
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": self._begin, "eos_token": self._end}
        path.with_name("tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    def _encode_text(self, text: str) -> list[int]:
        # `encode_batch_fast` computes no character offsets: it is 25 % faster than `encode`, and releases the GIL.
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids


def train_tokenizer(documents: Documents, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens: two special tokens, all bytes, and learned merges.

    Training is deterministic. It reads every n-th document of sources with more than 200 million characters.

    Raises:
        ValueError: if there are no documents, or `vocab_size` is too small for all bytes and the special tokens.
    """
    check_vocab_size(vocab_size)
    if not documents:
        raise ValueError(
            f"{documents.source} have no text to train a tokenizer on; set the tokenizer they were encoded with: "
            "data.tokenizer or model_from"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair that occurs once is not a pattern
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(_sample(documents), trainer)
    return Tokenizer(backend, begin=BEGIN, end=END)


def check_vocab_size(vocab_size: int) -> None:
    """Check that a byte-level tokenizer of this size can be trained.

    Raises:
        ValueError: if it is too small for all bytes and the special tokens.
    """
    smallest = BYTES + len((BEGIN, END))
    if vocab_size < smallest:
        raise ValueError(
            f"a vocabulary of {vocab_size} tokens is too small for a byte-level tokenizer; expected at least "
            f"{smallest} ({BYTES} bytes, {BEGIN} and {END}): use --model.vocab-size {smallest} or more, or give a "
            "tokenizer with --data.tokenizer"
        )


def _sample(documents: Documents) -> Iterator[str]:
    step = 1 + documents.characters // TRAINING_CHARACTERS
    return (documents[index] for index in range(0, len(documents), step))


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a `tokenizer.json`, or the one in a folder.

    A `tokenizer_config.json` next to it names the tokens that begin and end a document (`bos_token`, `eos_token`).
    Tokens that it does not mention are searched by common names.

    Raises:
        ValueError: if there is no tokenizer at `path`, or it has no token that ends a document.
    """
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        raise ValueError(
            f"no tokenizer at {path}; expected a Hugging Face tokenizer.json or a folder that contains one: use "
            "--data.tokenizer PATH"
        )
    size = file_inside(path.parent, path.name).stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; expected a tokenizer.json of at most {MAX_BYTES:,}")
    try:
        backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())  # `from_file` takes only paths in UTF-8
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{path} is not a Hugging Face tokenizer.json: {error}") from error
    config_file = path.with_name("tokenizer_config.json")
    config = read_json(path.parent, config_file.name) if config_file.exists() else {}
    begin = _special(backend, config, "bos_token", BEGIN_NAMES)
    end = _special(backend, config, "eos_token", END_NAMES)
    if end is None:
        raise ValueError(
            f"{path} has no token that ends a document; expected one of {', '.join(END_NAMES)}, "
            f'or its name in {config_file}: {{"eos_token": "..."}}'
        )
    return Tokenizer(backend, begin=begin, end=end)


def _special(backend: tokenizers.Tokenizer, config: dict, key: str, names: Sequence[str]) -> str | None:
    """Return the token that the config names under `key` (null means none), else the first of `names` that exists."""
    if key not in config:
        return next((name for name in names if backend.token_to_id(name) is not None), None)
    named = config[key]
    name = named.get("content") if isinstance(named, dict) else named  # older files store an object
    if name is not None and not isinstance(name, str):
        raise ValueError(f"tokenizer_config.json has {key} {reprlib.repr(named)}; expected the text of a token")
    if name is not None and backend.token_to_id(name) is None:
        raise ValueError(f"tokenizer_config.json names {key} {name!r}, which is not in the tokenizer's vocabulary")
    return name
