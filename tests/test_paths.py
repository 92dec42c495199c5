"""Only plain files inside a directory are opened."""

import os
from pathlib import Path

import pytest

from sightline.paths import file_inside


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc/passwd", "a\\b", "a\0b", None, 3, ["a"]])
def test_names_other_than_plain_names_are_refused(tmp_path: Path, name: object) -> None:
    with pytest.raises(ValueError, match=r"expected the plain name of a file in this directory"):
        file_inside(tmp_path, name)  # type: ignore[arg-type]


def test_plain_names_are_allowed_whether_the_file_exists_or_not(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("")
    for name in ("here", "absent", "with space", "$x", "[red]", "..x", "caf\udce9"):
        assert file_inside(tmp_path, name) == tmp_path / name


def test_links_inside_the_directory_are_allowed_and_others_are_refused(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "inside-not"
    for directory in (inside, outside):
        directory.mkdir()
        (directory / "file").write_text("")
    (inside / "good").symlink_to("file")
    (inside / "bad").symlink_to("../inside-not/file")
    (inside / "dangling").symlink_to("../absent")
    (inside / "twice").symlink_to("bad")
    (tmp_path / "alias").symlink_to(inside)
    assert file_inside(inside, "good").is_file()
    assert file_inside(tmp_path / "alias", "good").is_file(), "the directory itself may be a link"
    for name in ("bad", "dangling", "twice"):
        with pytest.raises(ValueError, match=rf"{name} is a link to .*, outside .* replace the link by a copy"):
            file_inside(inside, name)


def test_links_of_a_hugging_face_cache_are_allowed_only_into_the_blobs_of_the_same_model(tmp_path: Path) -> None:
    model, other = tmp_path / "models--a--b", tmp_path / "models--c--d"
    snapshot = model / "snapshots" / "0123"
    for directory in (snapshot, model / "blobs", other / "blobs"):
        directory.mkdir(parents=True)
    for directory in (model, other):
        (directory / "blobs" / "hash").write_text("")
    (snapshot / "good").symlink_to("../../blobs/hash")
    (snapshot / "bad").symlink_to("../../../models--c--d/blobs/hash")
    (model / "secret").write_text("")
    (snapshot / "above").symlink_to("../../secret")
    assert file_inside(snapshot, "good").is_file()
    for name in ("bad", "above"):
        with pytest.raises(ValueError, match="outside"):
            file_inside(snapshot, name)


def test_pipes_and_directories_are_refused(tmp_path: Path) -> None:
    """A read of a pipe would wait forever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    for name in ("pipe", "directory"):
        with pytest.raises(ValueError, match="is not a regular file"):
            file_inside(tmp_path, name)
