"""Arrays that are computed once, kept in the cache directory, and memory-mapped by each process and run that uses them.

CACHE_DIR/NAME/ARRAY        the elements of an array, without a header
CACHE_DIR/NAME/index.json   type, size and checksum of every array
CACHE_DIR/.NAME.*           being written, or left by a killed process

An entry is written under a temporary name and renamed, so processes may build the same entry at the same time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import xxhash

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

INDEX = "index.json"
BLOCK = 1 << 20  # bytes
MAX_BLOCKS = 1024
"""Blocks of a file that its checksum covers: all bytes up to 1 GiB, evenly spaced blocks of a larger file."""
ABANDONED = 24 * 3600
"""Seconds without a change after which a temporary directory is removed."""


def default_cache_dir() -> Path:
    """Return `sightline` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sightline"


def concatenate(parts: Iterator[Arrays]) -> Arrays:
    """Return the arrays in memory, from dictionaries with consecutive parts of each."""
    collected = list(parts)
    return {name: np.concatenate([part[name] for part in collected if name in part]) for name in collected[0]}


def cached_arrays(cache_dir: Path, name: str, build: Callable[[], Iterator[Arrays]]) -> Arrays:
    """Return the memory-mapped arrays of an entry of the cache, which `build` computes if they are not there.

    build  yields dictionaries with consecutive parts of each array, none of which is empty in total

    Raises:
        ValueError: if the cache directory cannot be used.
    """
    directory = cache_dir / name
    with _using(cache_dir):
        try:
            return _open(directory)
        except FileNotFoundError:
            pass
        except _Damaged as damage:
            log.warning("%s is damaged and is built again: %s", directory, damage)
            shutil.rmtree(directory)
    _build(directory, build)
    with _using(cache_dir):
        return _open(directory)


class _Damaged(OSError):
    """A file of an entry is missing, or is not as it was written."""


@contextlib.contextmanager
def _using(cache_dir: Path) -> Iterator[None]:
    """Replace an OSError inside the `with` block by a ValueError with the remedy."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"the cache directory {cache_dir} cannot be used: {error.strerror or error}; expected a writable directory "
            "with room for the tokens of all documents. Free some space, or choose another one with --data.cache-dir"
        ) from error


def _open(directory: Path) -> Arrays:
    """Map the arrays of an entry.

    Raises:
        FileNotFoundError: if there is no such entry.
        _Damaged: if a file of it is missing or was changed.
    """
    if not directory.exists():
        raise FileNotFoundError(directory)
    arrays = {}
    try:
        for name, written in json.loads((directory / INDEX).read_text()).items():
            path, dtype = directory / name, np.dtype(written["dtype"])
            if path.stat().st_size != written["bytes"] or _checksum(path, dtype) != written["checksum"]:
                raise _Damaged(f"{name} is not as it was written")
            # Indexing a memmap costs more than indexing the array below it.
            arrays[name] = np.asarray(np.memmap(path, dtype, mode="r"))
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(f"{type(error).__name__}: {error}") from error
    return arrays


def _build(directory: Path, build: Callable[[], Iterator[Arrays]]) -> None:
    cache_dir = directory.parent
    with _using(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(directory)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=cache_dir))
    try:
        dtypes: dict[str, np.dtype] = {}
        for part in build():
            with _using(cache_dir):
                for name, array in part.items():
                    dtypes[name] = array.dtype
                    with (temporary / name).open("ab") as file:
                        file.write(np.ascontiguousarray(array).data)
        with _using(cache_dir):
            _finish(temporary, directory, dtypes)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _finish(temporary: Path, directory: Path, dtypes: dict[str, np.dtype]) -> None:
    """Write the index and rename the directory, unless another process has built the same entry in the meantime."""
    index = {}
    for name, dtype in dtypes.items():
        path = temporary / name
        index[name] = {"dtype": dtype.str, "bytes": path.stat().st_size, "checksum": _checksum(path, dtype)}
    (temporary / INDEX).write_text(json.dumps(index))
    temporary.chmod(0o755)  # mkdtemp makes a private directory; other users may share the cache
    try:
        temporary.rename(directory)
    except OSError:
        if not directory.exists():
            raise


def _checksum(path: Path, dtype: np.dtype) -> str:
    """Return the XXH3-128 of the type and of a file, or of MAX_BLOCKS evenly spaced blocks of it."""
    digest = xxhash.xxh3_128(dtype.str.encode())
    blocks = -(-path.stat().st_size // BLOCK)
    covered = min(blocks, MAX_BLOCKS)
    with path.open("rb") as file:
        for number in range(covered):
            file.seek(number * blocks // covered * BLOCK)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _remove_abandoned(directory: Path) -> None:
    """Remove what killed processes have left of this entry."""
    for temporary in directory.parent.glob(f".{directory.name}.*"):
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (temporary, *temporary.iterdir()))
            if time.time() - newest > ABANDONED:
                shutil.rmtree(temporary)
