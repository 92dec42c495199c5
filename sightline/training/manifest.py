"""The manifest of a checkpoint: size and checksum of every file, and the search for damage.

XXH3 finds accidental damage. It is no signature: a checkpoint from somebody else is safe to read because nothing in it
is code, see `shards.py`.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from sightline.paths import file_inside, plain_name
from sightline.training.checkpoint_directory import MANIFEST, remedy

VERSION = 3
"""Version of the format of checkpoints. Manifests before it have no version, and no checksums."""
CHUNK = 1 << 20
"""Bytes that are read, or written, and added to a checksum at a time: they stay in the cache of a core."""


class Damaged(ValueError):
    """A checkpoint is not as it was written: `problem` names the file and what is wrong with it."""

    def __init__(self, checkpoint: Path, problem: str) -> None:
        super().__init__(f"{checkpoint} is damaged: {problem}. {remedy(checkpoint)}")
        self.checkpoint, self.problem = checkpoint, problem

    def __reduce__(self) -> tuple[type[Damaged], tuple[Path, str]]:
        return Damaged, (self.checkpoint, self.problem)  # a rank sends it to the others


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and XXH3 checksum of a file; the checksum is None in a checkpoint of version 0.2."""

    bytes: int
    xxh3: str | None


@dataclass(frozen=True)
class Manifest:
    """Contents of a manifest.json.

    files  size and checksum by file name
    mesh   degree of each parallelism of the run that wrote the checkpoint, {} in version 0.2
    """

    files: dict[str, FileSum]
    mesh: dict[str, int]
    version: int = VERSION

    @property
    def ranks(self) -> int:
        """Number of files of shards."""
        return sum(rank_of(name) is not None for name in self.files)

    def write(self, directory: Path) -> None:
        """Write the manifest and flush it to disk.

        Raises:
            OSError: if it cannot be written.
        """
        values = asdict(self)
        write_file(directory / MANIFEST, json.dumps({**values, "xxh3": _checksum(values)}, indent=2).encode())


def write_file(path: Path, contents: bytes) -> FileSum:
    """Write a small file and flush it to disk.

    Raises:
        OSError: if it cannot be written.
    """
    with path.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
    return FileSum(len(contents), xxhash.xxh3_128_hexdigest(contents))


def read_manifest(checkpoint: Path) -> Manifest:
    """Return the manifest of a checkpoint.

    Raises:
        Damaged: if it is missing or not as it was written.
        ValueError: if a newer version of Sightline has written it.
        OSError: if the file system has an error.
    """
    try:
        written = json.loads(file_inside(checkpoint, MANIFEST).read_bytes())
        version = int(written.get("version", 2))
        names = [plain_name(checkpoint, name) for name in written["files"]]
        if version == 2:
            return Manifest({name: FileSum(int(written["files"][name]), None) for name in names}, {}, version)
        if version == VERSION:
            recorded = written.pop("xxh3")
            if recorded != _checksum(written):
                raise Damaged(checkpoint, f"{MANIFEST} has another checksum than when it was written")
            return Manifest({name: FileSum(**written["files"][name]) for name in names}, written["mesh"])
    except (FileNotFoundError, NotADirectoryError):
        raise Damaged(checkpoint, f"{MANIFEST} is missing, the file that is written last") from None
    except Damaged:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(checkpoint, f"{MANIFEST} is not a manifest ({type(error).__name__}: {error})") from error
    raise ValueError(
        f"{checkpoint} has version {version} of the format, and this version of Sightline reads up to {VERSION}: "
        "update Sightline"
    )


def share_files(files: dict[str, FileSum], world: int) -> list[dict[str, FileSum]]:
    """Return the files that each of `world` ranks verifies: a rank those that it has most likely written."""
    shares: list[dict[str, FileSum]] = [{} for _ in range(world)]
    for number, (name, expected) in enumerate(sorted(files.items())):
        written_by = rank_of(name)
        shares[(number if written_by is None else written_by) % world][name] = expected
    return shares


def find_damage(checkpoint: Path, files: dict[str, FileSum], *, contents: bool) -> str | None:
    """Compare files with their sums in the manifest; return the first problem as text, or None.

    contents  also compare checksums, which reads every byte; otherwise only sizes

    Raises:
        OSError: if the file system has an error.
    """
    for name, expected in files.items():
        try:
            path = file_inside(checkpoint, name)
            size = path.stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        except ValueError as error:
            return str(error)
        if size != expected.bytes or not path.is_file():
            return f"{name} has {size:,} bytes, expected {expected.bytes:,}"
        if contents and expected.xxh3 is not None and checksum_of(path) != expected.xxh3:
            return f"{name} has other contents than when it was written (its checksum differs)"
    return None


def checksum_of(path: Path) -> str:
    """Return the checksum of a file: XXH3, 128 bits, hexadecimal."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def shard_file(rank: int) -> str:
    """Return the name of the file with the shards that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def rank_of(name: str) -> int | None:
    """Return the rank that wrote a file of shards, or None for another file."""
    found = re.fullmatch(r"rank-(\d{5,9})\.safetensors", name)
    return int(found[1]) if found else None


def _checksum(manifest: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
