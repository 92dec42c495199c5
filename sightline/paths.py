"""Files of directories that others wrote: only plain files inside the directory are opened. Imports no PyTorch."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

MAX_CONFIG_BYTES = 2**24
"""Largest config that is read, 16 MiB; the largest published ones have less than 1 MiB."""


def plain_name(directory: Path, name: str) -> str:
    """Return the name of a file in a directory, after a check that it is a plain name. Reads no files.

    Raises:
        ValueError: if it is empty, or a path.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise ValueError(
            f"{directory} names the file {name!r}; expected the plain name of a file in this directory: correct the "
            "file that lists it, or download the directory again"
        )
    return name


def file_inside(directory: Path, name: str) -> Path:
    """Return `directory / name`, after a check that this is a plain file inside the directory, or does not exist.

    A directory from elsewhere can list `../../.ssh/id_rsa` in its index, or have a link with that target. Code that
    reads or copies a file of such a directory gets its path from here. Links inside the directory are allowed, and so
    are the links of a Hugging Face cache, from `models--NAME/snapshots/REVISION` to `models--NAME/blobs`.

    Raises:
        ValueError: if the name is not a plain name, the file is a link that leaves the directory, or it is neither a
            file nor a link to one, such as a pipe.
    """
    path = directory / plain_name(directory, name)
    root, target = Path(os.path.realpath(directory)), Path(os.path.realpath(path))
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        allowed.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(parent) for parent in allowed):
        raise ValueError(
            f"{path} is a link to {target}, outside {directory}; expected a file inside it: if you trust that file, "
            "replace the link by a copy of it"
        )
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is not a regular file; expected a file: remove it, or download it again")
    return path


def read_json(directory: Path, name: str, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file of a directory that others wrote; see `file_inside`.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it is not a file inside the directory, larger than `max_bytes`, or not a JSON object.
    """
    path = file_inside(directory, name)
    size = path.stat().st_size
    if size > max_bytes:
        raise ValueError(f"{path} has {size:,} bytes; expected at most {max_bytes:,}: download it again")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise ValueError(f"{path} is not JSON ({reason}); it is damaged: download or write it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} contains a JSON {type(value).__name__}; expected an object")
    return value


def printable(text: str) -> str:
    """Return text that any terminal, plot and encoding can show: control characters, and the surrogates that stand for
    bytes of file names that are no UTF-8, are replaced by escapes such as `\\x1b` and `\\udce9`."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda c: c[0].encode("unicode_escape").decode(), text)
