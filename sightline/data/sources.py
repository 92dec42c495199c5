"""Sources of documents: Python's standard library, local files, Hugging Face datasets."""

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
except ImportError:  # the extra `data`
    datasets = None  # type: ignore[assignment]

EXTENSIONS = (".jsonl", ".md", ".py", ".txt")
NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"})
"""Folders inside the standard library's folder that contain other packages, or tests with artificial text."""


def load_documents(data: DataConfig) -> Documents:
    """Load the documents of `data.source`, in an order that depends only on the source.

    A file is one document; a .jsonl file has one document per line. Files are read into memory; a Hugging Face dataset
    stays on disk. Files that are not UTF-8 and documents without text are listed in `.skipped`.

    Raises:
        ValueError: if the source does not exist or contains no text, or a line of a .jsonl file is not an object with
            text in `data.text_field`.
    """
    if data.source == SYNTHETIC_IMAGES:
        return caption_documents()
    if data.source == "python-stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        return _read(root, _find(root, (".py",), NOT_STDLIB), data)
    if is_dataset(data):
        return _load_dataset(data)
    path = Path(data.source).expanduser()
    if path.is_dir():
        return _read(path, _find(path, EXTENSIONS), data)
    if path.is_file():
        return _read(path.parent, [path] if path.suffix.lower() in EXTENSIONS else [], data)
    raise ValueError(
        f"data.source {data.source!r} does not exist: expected `python-stdlib`, a file or folder of "
        f"{', '.join(EXTENSIONS)}, `hf:NAME`, or `{SYNTHETIC_IMAGES}`; paths are relative to {Path.cwd()}"
    )


def is_dataset(data: DataConfig) -> bool:
    """Return whether the source is a Hugging Face dataset: the first process that loads it caches it on disk."""
    return data.source.startswith("hf:")


def _find(root: Path, extensions: tuple[str, ...], exclude: frozenset[str] = frozenset()) -> list[Path]:
    """Return the files below `root` with these extensions, sorted, without hidden files and excluded folders."""

    def stop(error: OSError) -> None:  # by default, os.walk silently skips folders that it cannot read
        raise error

    found = []
    for folder, folders, files in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if name not in exclude and not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    found = [path for path in found if path.suffix.lower() in extensions and path.is_file()]
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
            reason = _skip_reason(part)
            if reason is None:
                texts.append(part)
            else:
                skipped[reason].append(f"{name} line {line}" if line else name)
    return _check_not_empty(Documents.from_texts(texts, source=data.source, skipped=skipped))


def _lines(path: Path, text: str, text_field: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) for each line of a .jsonl file."""
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may contain U+2028
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error}); expected one object per line") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path} line {number} is a JSON {type(record).__name__}, expected an object: {line[:80]}")
        if not isinstance(record.get(text_field), str):
            raise ValueError(
                f"{path} line {number} has no text in the field {text_field!r}, only {_fields(record)}; "
                "set --data.text-field to the field with the text"
            )
        yield number, record[text_field]


def _fields(record: dict[str, object]) -> str:
    return ", ".join(f"{name} ({type(value).__name__})" for name, value in record.items()) or "no fields"


def _skip_reason(text: str | None) -> str | None:
    """Return the reason to skip a text, or None if it is a valid document."""
    if text is None or not text.strip():
        return "empty"
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate: allowed in JSON, but not encodable for tokenizers
        return "not UTF-8"
    return None


def _load_dataset(data: DataConfig) -> Documents:
    """Load the `train` split of a Hugging Face dataset; `datasets` caches the lengths of the texts."""
    if datasets is None:
        raise ValueError(f"data.source {data.source} needs the package `datasets`: pip install 'sightline[data]'")
    name = data.source.removeprefix("hf:")
    try:
        dataset = datasets.load_dataset(name, split="train")
    except FileNotFoundError as error:
        raise ValueError(f"data.source {data.source} does not exist: {error}") from error
    features = {column: getattr(kind, "dtype", str(kind)) for column, kind in dataset.features.items()}
    if features.get(data.text_field) not in ("string", "large_string"):
        columns = ", ".join(f"{column} ({kind})" for column, kind in features.items())
        raise ValueError(
            f"data.source {data.source} has no text in the field {data.text_field!r}, only {columns}; "
            "set --data.text-field to the field with the text"
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
    return _check_not_empty(documents)


def _measure(texts: list[str | None]) -> dict[str, list[int]]:
    """Return the number of characters of each text, 0 if it is not a valid document."""
    return {"length": [len(text) if text is not None and _skip_reason(text) is None else 0 for text in texts]}


class _Column(Sequence[str]):
    """One column of a dataset, read from disk when it is needed."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.dataset[index][self.name]

    def __getitems__(self, rows: list[int]) -> list[str]:
        return list(self.dataset[rows][self.name])


def _check_not_empty(documents: Documents) -> Documents:
    if len(documents) == 0:
        skipped = describe_skipped(documents.skipped)
        raise ValueError(
            f"data.source {documents.source} contains no text; expected at least one document in files that end in "
            f"{', '.join(EXTENSIONS)} and are not hidden" + (f"; skipped {skipped}" if skipped else "")
        )
    return documents
