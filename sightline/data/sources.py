"""Where documents come from: Python's own standard library, local files, Hugging Face datasets."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sightline.config import DataConfig
from sightline.data.documents import Documents, describe_skipped
from sightline.data.synthetic_images import SYNTHETIC_IMAGES, caption_documents

try:
    import datasets
except ImportError:  # the extra `hf`
    datasets = None  # type: ignore[assignment]

ENDINGS = (".jsonl", ".md", ".py", ".txt")
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"})
"""Folders beside or inside the standard library that are not it, or are tests full of made-up text."""


def load_documents(data: DataConfig) -> Documents:
    """The documents of `data.source`, in an order that depends on nothing but the source.

    A file is one document, a .jsonl file one a line. Texts of files are held in memory; a Hugging Face dataset stays
    on the disk. Files that are not UTF-8 and documents without any text are left out and counted in `.skipped`.

    Errors: ValueError for a source that does not exist or holds no text, and for a .jsonl line that is not an object
    with text in `data.text_field`.
    """
    if data.source == SYNTHETIC_IMAGES:
        return caption_documents()
    if data.source == "python-stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return _read(root, _find(root, (".py",), NOT_STDLIB), data)
    if data.source.startswith("hf:"):
        return _load_dataset(data)
    path = Path(data.source).expanduser()
    if path.is_dir():
        return _read(path, _find(path, ENDINGS), data)
    if path.is_file():
        return _read(path.parent, [path] if path.suffix.lower() in ENDINGS else [], data)
    raise ValueError(
        f"data.source {data.source!r} does not exist: expected `python-stdlib`, a file or folder of "
        f"{', '.join(ENDINGS)}, `hf:NAME`, or `{SYNTHETIC_IMAGES}`; seen from {Path.cwd()}"
    )


def _find(root: Path, endings: tuple[str, ...], leave_out: frozenset[str] = frozenset()) -> list[Path]:
    """Files below `root` by ending, sorted; nothing hidden, and no folder whose name is in `leave_out`."""

    def stop(error: OSError) -> None:  # os.walk would pass over a folder it may not read, and lose it silently
        raise error

    found = []
    for folder, folders, files in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if name not in leave_out and not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    found = [path for path in found if path.suffix.lower() in endings and path.is_file()]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _read(root: Path, files: list[Path], data: DataConfig) -> Documents:
    texts: list[str] = []
    skipped: dict[str, list[str]] = {"not UTF-8": [], "empty": []}
    for path in files:
        name = path.relative_to(root).as_posix()
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError:
            skipped["not UTF-8"].append(name)
            continue
        parts = _lines(path, text, data.text_field) if path.suffix.lower() == ".jsonl" else [(0, text)]
        for line, part in parts:
            reason = _fault(part)
            if reason is None:
                texts.append(part)
            else:
                skipped[reason].append(f"{name} line {line}" if line else name)
    return _refuse_nothing(Documents.from_texts(texts, source=data.source, skipped=skipped))


def _lines(path: Path, text: str, text_field: str) -> Iterator[tuple[int, str]]:
    """(line number, text) of each line of a .jsonl file."""
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a JSON string
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error}): expected one object a line") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path} line {number} is a JSON {type(record).__name__}, expected an object: {line[:80]}")
        if not isinstance(record.get(text_field), str):
            raise ValueError(
                f"{path} line {number} has no text in the field {text_field!r}, only {_fields(record)}: "
                "name the field that holds the text with --data.text-field"
            )
        yield number, record[text_field]


def _fields(record: dict[str, object]) -> str:
    return ", ".join(f"{name} ({type(value).__name__})" for name, value in record.items()) or "no field at all"


def _fault(text: str | None) -> str | None:
    """Why a text cannot be a document, or None where it can."""
    if text is None or not text.strip():
        return "empty"
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and no tokenizer takes
        return "not UTF-8"
    return None


def _load_dataset(data: DataConfig) -> Documents:
    """The `train` split of a Hugging Face dataset, measured once: `datasets` keeps the lengths in its cache."""
    if datasets is None:
        raise ValueError(f"data.source {data.source} needs the package `datasets`: pip install 'sightline[hf]'")
    name = data.source.removeprefix("hf:")
    try:
        dataset = datasets.load_dataset(name, split="train")
    except FileNotFoundError as error:
        raise ValueError(f"data.source {data.source} does not exist: {error}") from error
    features = {column: getattr(kind, "dtype", str(kind)) for column, kind in dataset.features.items()}
    if features.get(data.text_field) not in ("string", "large_string"):
        columns = ", ".join(f"{column} ({kind})" for column, kind in features.items())
        raise ValueError(
            f"data.source {data.source} has no text in the field {data.text_field!r}, only {columns}: "
            "name the field that holds the text with --data.text-field"
        )
    dataset = dataset.select_columns([data.text_field])
    measured = dataset.map(_measure, batched=True, input_columns=data.text_field, remove_columns=data.text_field)
    lengths = np.array(measured["length"][:], dtype=np.int64)
    documents = Documents(
        texts=_Column(dataset, data.text_field),
        order=np.flatnonzero(lengths),
        lengths=lengths[lengths > 0],
        source=data.source,
        skipped={"empty": [f"row {row}" for row in np.flatnonzero(lengths == 0)]},
    )
    return _refuse_nothing(documents)


def _measure(texts: list[str | None]) -> dict[str, list[int]]:
    """Characters of each text, 0 where it cannot be a document."""
    return {"length": [len(text) if text is not None and _fault(text) is None else 0 for text in texts]}


class _Column(Sequence[str]):
    """One column of a dataset, read from the disk row by row."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index][self.name]


def _refuse_nothing(documents: Documents) -> Documents:
    if len(documents) == 0:
        skipped = describe_skipped(documents.skipped)
        raise ValueError(
            f"data.source {documents.source} holds no text: expected at least one document in files that end in "
            f"{', '.join(ENDINGS)} and are not hidden" + (f"; skipped {skipped}" if skipped else "")
        )
    return documents
