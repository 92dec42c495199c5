"""The documents of a source, the texts that were skipped, and the split into training and validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import xxhash

DIGEST_CHARACTERS = 1_000_000_000
"""Characters up to which the digest covers the contents of all documents."""
DIGEST_DOCUMENTS = 65_536
"""Number of documents of a larger source whose contents the digest covers."""
READ_DOCUMENTS = 1024  # documents that are read at a time for the digest
SPLIT_SEED = 0  # constant, so that the seed of a run does not change which documents are held out


@dataclass(frozen=True, eq=False, kw_only=True)
class Documents:
    """Sequence of N non-empty texts in a fixed order.

    texts    all texts of the source, as any sequence; it may read them from disk, many at a time if it has
             `__getitems__`, as the datasets of PyTorch and of Hugging Face have
    order    int64 [N], index of each document in `texts`
    lengths  int64 [N], number of characters of each document
    source   the source, as the user named it
    skipped  {reason: names of the texts that were skipped}
    """

    texts: Sequence[str]
    order: np.ndarray
    lengths: np.ndarray
    source: str = "memory"
    skipped: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def from_texts(
        cls, texts: Sequence[str], *, source: str = "memory", skipped: Mapping[str, Sequence[str]] | None = None
    ) -> Documents:
        """Create documents from texts in memory."""
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        return cls(texts=texts, order=np.arange(len(texts)), lengths=lengths, source=source, skipped=skipped or {})

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> str:
        return self.texts[int(self.order[index])]

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    @property
    def characters(self) -> int:
        """Total number of characters."""
        return int(self.lengths.sum())

    @cached_property
    def digest(self) -> str:
        """XXH3-128 of the lengths and texts of all documents, in order.

        If they have more than DIGEST_CHARACTERS characters, the texts of DIGEST_DOCUMENTS evenly spaced documents.
        """
        digest = xxhash.xxh3_128(np.ascontiguousarray(self.lengths, "<i8").data)
        sampled = len(self) if self.characters <= DIGEST_CHARACTERS else min(len(self), DIGEST_DOCUMENTS)
        for first in range(0, sampled, READ_DOCUMENTS):
            numbers = np.arange(first, min(first + READ_DOCUMENTS, sampled))
            for text in self.read(numbers * len(self) // max(sampled, 1)):
                digest.update(text.encode())
        return digest.hexdigest()

    def read(self, index: np.ndarray) -> list[str]:
        """Return the documents at `index` (int64 [M]), in that order."""
        rows = self.order[index].tolist()
        read_many = getattr(self.texts, "__getitems__", None)
        return [self.texts[row] for row in rows] if read_many is None else read_many(rows)

    def select(self, index: np.ndarray) -> Documents:
        """Return the documents at `index` (int64 [M]), in that order."""
        return replace(self, order=self.order[index], lengths=self.lengths[index], skipped={})

    def describe(self) -> str:
        """Return a one-line summary: numbers of documents and characters, and the skipped texts by reason."""
        line = f"{len(self):,} documents, {self.characters:,} characters from {self.source}"
        return line + (f"; skipped {describe_skipped(self.skipped)}" if any(self.skipped.values()) else "")


def describe_skipped(skipped: Mapping[str, Sequence[str]]) -> str:
    """Return the skipped texts as text: `2 not UTF-8 (a.txt, b/c.md), 31 empty (x.py, y.py, z.py, ...)`."""
    parts = []
    for reason, names in skipped.items():
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            parts.append(f"{len(names):,} {reason} ({shown})")
    return ", ".join(parts)


def split_documents(documents: Documents, validation_fraction: float) -> tuple[Documents, Documents]:
    """Split into (training, validation) documents, independently of the seed of the run.

    If the fraction is greater than 0, both parts have at least one document. The validation documents are in random
    order, so that their first rows are a representative sample.

    Raises:
        ValueError: if the fraction is greater than 0 and there are fewer than 2 documents.
    """
    if validation_fraction == 0:
        return documents, documents.select(np.arange(0))
    if len(documents) < 2:
        raise ValueError(
            f"data.validation-fraction {validation_fraction} needs at least 2 documents, but {documents.source} "
            f"contains {len(documents)}; split the text into more documents (files, or lines of a .jsonl file), or use "
            "--data.validation-fraction 0"
        )
    held_out = min(max(1, round(len(documents) * validation_fraction)), len(documents) - 1)
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(documents))
    return documents.select(np.sort(shuffled[held_out:])), documents.select(shuffled[:held_out])
