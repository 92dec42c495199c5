"""Files of directories that others wrote: only plain files inside the directory are opened. Imports no PyTorch."""

from __future__ import annotations

import os
from pathlib import Path


def file_inside(directory: Path, name: str) -> Path:
    """Return `directory / name`, after a check that this is a plain file inside the directory, or does not exist.

    A directory from elsewhere can list `../../.ssh/id_rsa` in its index, or have a link with that target. Code that
    reads or copies a file of such a directory gets its path from here. Links inside the directory are allowed, and so
    are the links of a Hugging Face cache, from `models--NAME/snapshots/REVISION` to `models--NAME/blobs`.

    Raises:
        ValueError: if the name is not a plain name, the file is a link that leaves the directory, or it is neither a
            file nor a link to one, such as a pipe.
    """
    if not isinstance(name, str) or name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise ValueError(
            f"{directory} names the file {name!r}; expected the plain name of a file in this directory: correct the "
            "file that lists it, or download the directory again"
        )
    path = directory / name
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
