"""The cache of arrays: reuse, damage, races, and directories that cannot be written."""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from sightline.data import array_cache
from sightline.data.array_cache import Arrays, cached_arrays, default_cache_dir

EXPECTED = np.arange(1000)


class Build:
    """Two arrays in two parts, and the number of times they were built."""

    calls = 0

    def __call__(self) -> Iterator[Arrays]:
        self.calls += 1
        yield {"numbers": EXPECTED[:400], "more": np.ones(1, np.uint16)}
        yield {"numbers": EXPECTED[400:]}


def test_arrays_are_built_once(tmp_path: Path) -> None:
    build = Build()
    for _ in range(2):
        arrays = cached_arrays(tmp_path / "new" / "cache", "entry", build)
        assert np.array_equal(arrays["numbers"], EXPECTED) and arrays["more"].tolist() == [1]
    assert build.calls == 1
    assert [path.name for path in (tmp_path / "new" / "cache").iterdir()] == ["entry"]
    cached_arrays(tmp_path / "new" / "cache", "another", build)
    assert build.calls == 2


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [Path.unlink, cut, flip, empty])
@pytest.mark.parametrize("name", ["numbers", "more", "index.json"])
def test_a_damaged_entry_is_built_again(
    name: str, damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build = Build()
    cached_arrays(tmp_path, "entry", build)
    damage(tmp_path / "entry" / name)
    with caplog.at_level(logging.WARNING):
        arrays = cached_arrays(tmp_path, "entry", build)
    assert np.array_equal(arrays["numbers"], EXPECTED)
    assert build.calls == 2
    assert "entry is damaged and is built again" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_every_bit_of_the_index_is_checked(tmp_path: Path) -> None:
    build = Build()
    cached_arrays(tmp_path, "entry", build)
    index = tmp_path / "entry" / "index.json"
    whole = index.read_bytes()
    for byte in range(len(whole)):
        changed = bytearray(whole)
        changed[byte] ^= 1
        index.write_bytes(changed)
        arrays = cached_arrays(tmp_path, "entry", build)
        assert np.array_equal(arrays["numbers"], EXPECTED) and arrays["numbers"].dtype == EXPECTED.dtype
        index.write_bytes(whole)


def test_blocks_of_a_large_file_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_cache, "BLOCK", 64)
    monkeypatch.setattr(array_cache, "MAX_BLOCKS", 8)
    build = Build()
    cached_arrays(tmp_path, "entry", build)
    content = bytearray((tmp_path / "entry" / "numbers").read_bytes())
    content[-1000] ^= 1  # the last of 8 blocks among 125 begins at byte 6976
    (tmp_path / "entry" / "numbers").write_bytes(content)
    cached_arrays(tmp_path, "entry", build)
    assert build.calls == 2


def test_the_loser_of_a_race_uses_the_entry_of_the_winner(tmp_path: Path) -> None:
    winner = Build()

    def build() -> Iterator[Arrays]:
        yield {"numbers": EXPECTED, "more": np.ones(1, np.uint16)}
        cached_arrays(tmp_path, "entry", winner)  # another process finishes first

    assert np.array_equal(cached_arrays(tmp_path, "entry", build)["numbers"], EXPECTED)
    assert winner.calls == 1 and [path.name for path in tmp_path.iterdir()] == ["entry"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build() -> Iterator[Arrays]:
        yield {"numbers": EXPECTED}
        raise OSError("disk of the documents gone")

    with pytest.raises(OSError, match="disk of the documents gone"):
        cached_arrays(tmp_path, "entry", build)
    assert not any(tmp_path.iterdir())


def test_remains_of_killed_processes_are_removed(tmp_path: Path) -> None:
    for name in (".entry.old", ".entry.new", ".another.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "numbers").write_text("")
    for name in (".entry.old", ".another.old"):
        for path in (tmp_path / name / "numbers", tmp_path / name):
            os.utime(path, (0, 0))
    cached_arrays(tmp_path, "entry", Build())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".another.old", ".entry.new", "entry"]


def test_an_unusable_directory_is_refused_with_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/cache")):
        with pytest.raises(ValueError, match=rf"cache directory {directory} cannot be used: .*--data\.cache-dir"):
            cached_arrays(directory, "entry", Build())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_refused_with_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *mode: original(Path("/dev/full") if mode == ("ab",) else path, *mode)
    )
    with pytest.raises(ValueError, match=r"cannot be used: No space left on device; .*--data\.cache-dir"):
        cached_arrays(tmp_path, "entry", Build())
    assert not any(tmp_path.iterdir())


def test_default_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/sightline")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_cache_dir() == Path("/home/me/.cache/sightline")
