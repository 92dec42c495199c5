"""The documents of a source: a sequence of texts, what was left out, and the share held out for validation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

SPLIT_SEED = 0  # any constant: a run's seed must not move documents from training to validation


@dataclass(frozen=True, eq=False, kw_only=True)
class Documents:
    """N texts, none of them empty, always in the same order.

    texts    what the source holds; anything with [i], so a large one may stay on the disk
    order    int64 [N], which of `texts` the documents are
    lengths  int64 [N], characters of each document
    source   where they come from, in the user's words
    skipped  reason -> the names of everything left out for it
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
        """Documents that lie in memory."""
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
        """Characters of all documents."""
        return int(self.lengths.sum())

    def select(self, index: np.ndarray) -> Documents:
        """The documents at `index` (int64 [M]), in that order."""
        return replace(self, order=self.order[index], lengths=self.lengths[index], skipped={})

    def describe(self) -> str:
        """One line: how many documents and characters, and what was skipped and why."""
        line = f"{len(self):,} documents, {self.characters:,} characters from {self.source}"
        return line + (f"; skipped {describe_skipped(self.skipped)}" if any(self.skipped.values()) else "")


def describe_skipped(skipped: Mapping[str, Sequence[str]]) -> str:
    """`2 not UTF-8 (a.txt, b/c.md), 31 empty (x.py, y.py, z.py, ...)`."""
    parts = []
    for reason, names in skipped.items():
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            parts.append(f"{len(names):,} {reason} ({shown})")
    return ", ".join(parts)


def split_documents(documents: Documents, validation_fraction: float) -> tuple[Documents, Documents]:
    """(training, validation): a share of the documents is held out, the same ones whatever the run's seed.

    Each side gets at least one document where the share is above 0. The validation documents are in random order, so
    that the first rows of them already are a fair sample.

    Errors: ValueError where the share is above 0 and there are fewer than 2 documents.
    """
    if validation_fraction == 0:
        return documents, documents.select(np.arange(0))
    if len(documents) < 2:
        raise ValueError(
            f"data.validation-fraction {validation_fraction} holds documents out, but {documents.source} holds only "
            f"{len(documents)}, expected at least 2: split the text into more documents (files, or lines of a .jsonl) "
            "or set --data.validation-fraction 0"
        )
    held_out = min(max(1, round(len(documents) * validation_fraction)), len(documents) - 1)
    shuffled = np.random.default_rng(SPLIT_SEED).permutation(len(documents))
    return documents.select(np.sort(shuffled[held_out:])), documents.select(shuffled[:held_out])
