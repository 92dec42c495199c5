"""Text to token ids and back: byte-level BPE, trained here or loaded from any Hugging Face `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from sightline.data.documents import Documents

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
BYTES = 256  # the alphabet of a byte-level BPE: with it any text can be written, and read back unchanged
BEGIN_NAMES = (BEGIN, "<s>", "<bos>", "<|startoftext|>")
END_NAMES = (END, "</s>", "<eos>", "<|endoftext|>", "<|eot_id|>", "<|im_end|>")
"""Looked for in this order where no tokenizer_config.json says which tokens begin and end a document."""
TRAINING_CHARACTERS = 200_000_000  # characters; more of a source adds minutes to the training and nothing to the merges


class Tokenizer:
    """Encodes a document as [begin] + its text + [end]; the begin token only where the vocabulary has one.

    The text itself never becomes a special token: `<|end_of_text|>` written in a document is encoded as the
    characters it is made of.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, begin: str | None, end: str) -> None:
        self._backend = backend
        self._begin, self._end = begin, end
        # Only what is marked special is kept out of the text, and some files forget to mark it.
        backend.add_special_tokens([name for name in (begin, end) if name is not None])
        backend.encode_special_tokens = True  # the library's name for: treat special tokens in the text as text
        # Some files cut or pad every text they encode; here a document is whole.
        backend.no_truncation()
        backend.no_padding()
        self.bos_id: int | None = None if begin is None else backend.token_to_id(begin)
        end_id = backend.token_to_id(end)
        assert end_id is not None
        self.eos_id: int = end_id
        for name in (begin, end):
            if name is not None and backend.token_to_id(name) in self._encode_text(name):
                raise ValueError(
                    f"this tokenizer turns the text {name!r} into its special token, so a document could forge a "
                    "boundary; use a byte-level BPE tokenizer"
                )

    @property
    def vocab_size(self) -> int:
        """Rows an embedding needs: the largest id + 1 (the ids of a loaded tokenizer may have gaps)."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """The same for tokenizers that encode alike, also after saving and loading."""
        facts = self._backend.to_str() + f"\0{self._begin}\0{self._end}"
        return hashlib.sha256(facts.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """The ids of a whole document: [begin] + text + [end]."""
        return [*self.encode_prompt(text), self.eos_id]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a document that goes on: [begin] + text."""
        ids = self._encode_text(text)
        return ids if self.bos_id is None else [self.bos_id, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids, without the special ones."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def save(self, path: Path) -> None:
        """Write `path`, a tokenizer.json, and beside it the tokenizer_config.json that names begin and end."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(path))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": self._begin, "eos_token": self._end}
        path.with_name("tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")

    def _encode_text(self, text: str) -> list[int]:
        # The batch form that keeps no character offsets is a quarter faster than `encode`, and lets other threads run.
        return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids


def train_tokenizer(documents: Documents, vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens: two special ones, all bytes, and merges learnt from the text.

    The same documents give the same tokenizer. Of a source past 200 million characters every n-th document is read.

    Errors: ValueError where `vocab_size` does not hold all bytes and the special tokens.
    """
    smallest = BYTES + len((BEGIN, END))
    if vocab_size < smallest:
        raise ValueError(
            f"a vocabulary of {vocab_size} is too small for a byte-level tokenizer: "
            f"expected at least {smallest} ({BYTES} bytes, {BEGIN} and {END})"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,  # a pair seen once is no habit of the text, it is the text
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(_sample(documents), trainer)
    return Tokenizer(backend, begin=BEGIN, end=END)


def _sample(documents: Documents) -> Iterator[str]:
    step = 1 + documents.characters // TRAINING_CHARACTERS
    return (documents[index] for index in range(0, len(documents), step))


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, or of a folder that holds one.

    A `tokenizer_config.json` beside it says which tokens begin and end a document (`bos_token`, `eos_token`); what it
    does not mention is found by its common names.

    Errors: ValueError where there is no tokenizer at `path`, or none of its tokens ends a document.
    """
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no tokenizer at {path}: expected a Hugging Face tokenizer.json or a folder that holds one")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"{path} is no Hugging Face tokenizer.json: {error}") from error
    beside = path.with_name("tokenizer_config.json")
    config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
    begin = _special(backend, config, "bos_token", BEGIN_NAMES)
    end = _special(backend, config, "eos_token", END_NAMES)
    if end is None:
        raise ValueError(
            f"{path} has no token that ends a document: looked for {', '.join(END_NAMES)}; "
            f'name it in {beside} as {{"eos_token": "..."}}'
        )
    return Tokenizer(backend, begin=begin, end=end)


def _special(backend: tokenizers.Tokenizer, config: dict, key: str, names: Sequence[str]) -> str | None:
    """The special token that the config names under `key` (null is none), else the first of `names` there is."""
    if key not in config:
        return next((name for name in names if backend.token_to_id(name) is not None), None)
    named = config[key]
    name = named["content"] if isinstance(named, dict) else named  # older files spell the token out as an object
    if name is not None and backend.token_to_id(name) is None:
        raise ValueError(f"tokenizer_config.json names {key} {name!r}, which is not in the tokenizer's vocabulary")
    return name
