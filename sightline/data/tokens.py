"""The tokens of all documents in one memory-mapped array: each document is tokenized once, before the first step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sightline.data.array_cache import Arrays, cached_arrays
from sightline.data.documents import Documents
from sightline.data.tokenizer import Tokenizer

VERSION = 1
"""Version of the cached arrays; a change of their contents or meaning increases it."""
BATCH_CHARACTERS, BATCH_DOCUMENTS = 4_000_000, 4096
"""Documents are tokenized in batches of about so many characters, and at most so many documents."""


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenizedDocuments:
    """N documents, each complete with its begin and end tokens.

    name     name in the cache, which identifies texts and tokenizer
    tokens   uint16 or uint32 [T], the tokens of all documents, one after the other
    offsets  int64 [N + 1], index of the first token of each document; the last one is T
    """

    name: str
    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1


def tokenize_documents(documents: Documents, tokenizer: Tokenizer, cache_dir: Path) -> TokenizedDocuments:
    """Return the tokens of all documents, from the cache if these documents were tokenized before.

    Raises:
        ValueError: if the cache directory cannot be used.
    """
    name = f"tokens-{VERSION}-{documents.digest}-{tokenizer.fingerprint}"
    arrays = cached_arrays(cache_dir, name, lambda: _tokenize(documents, tokenizer))
    return TokenizedDocuments(name=name, tokens=arrays["tokens"], offsets=arrays["offsets"])


def _tokenize(documents: Documents, tokenizer: Tokenizer) -> Iterator[Arrays]:
    """Yield the tokens of consecutive documents, and the end of each of these documents."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    total = 0
    yield {"tokens": np.zeros(0, dtype), "offsets": np.zeros(1, np.int64)}
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("tokenizing {task.completed:,}/{task.total:,} documents"),
        BarColumn(bar_width=None),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal or os.environ.get("RANK", "0") != "0",
        transient=True,
    )
    with progress:
        task = progress.add_task("tokenize", total=len(documents))
        for index in _batches(documents.lengths):
            encoded = tokenizer.encode_all(documents.read(index))
            ends = total + np.cumsum([len(ids) for ids in encoded])
            total = int(ends[-1])
            yield {"tokens": np.concatenate([np.array(ids, dtype) for ids in encoded]), "offsets": ends}
            progress.advance(task, len(index))


def _batches(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the indices of consecutive documents; a document longer than BATCH_CHARACTERS is a batch of its own."""
    first = 0
    while first < len(lengths):
        characters = np.cumsum(lengths[first : first + BATCH_DOCUMENTS])
        last = first + max(1, int(np.searchsorted(characters, BATCH_CHARACTERS, side="right")))
        yield np.arange(first, last)
        first = last
