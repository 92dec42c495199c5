"""Damaged checkpoints: an automatic start passes over them, every other reader refuses them and names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sightline.parallel.host import HostGroup
from sightline.training import manifest as manifests
from sightline.training.checkpoint import check_checkpoint
from sightline.training.checkpoint_directory import list_checkpoints
from sightline.training.export import export_checkpoint
from sightline.training.loading import load
from sightline.training.manifest import Damaged, read_manifest
from sightline.training.resume import pass_over_damage
from sightline.training.run_directory import RunDirectory
from tests.parallel.test_meshes import train_on
from tests.support.processes import run_on_ranks
from tests.support.small_runs import STEPS, rows_of, small_run, train_quietly, weights_of, write_corpus


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("source") / "texts")


@pytest.fixture(scope="module")
def written(source, tmp_path_factory) -> Path:
    """A run whose checkpoints two ranks have written: step-3, step-6 and step-8."""
    directory = tmp_path_factory.mktemp("written") / "run"
    run_on_ranks(2, train_on, small_run(directory, source, checkpoint__keep=3), join=False)
    return directory


@pytest.fixture
def run(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))


FILES = (
    *("rank-00000.safetensors", "rank-00001.safetensors", "state.json"),
    *("config.json", "tokenizer.json", "tokenizer_config.json", "manifest.json"),
)


def flip(at: float) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        contents = bytearray(file.read_bytes())
        contents[int(len(contents) * at)] ^= 1
        file.write_bytes(contents)

    return damage


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def replace_by_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_link(file: Path) -> None:
    """Move the file out of the checkpoint, and leave a link to it."""
    outside = file.parent.parent.parent / file.name
    file.rename(outside)
    file.symlink_to(outside)


HOW: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b"") and None,
    "cut": cut,
    "zeroed": zero,
    **{f"a bit flipped at {at}": flip(at) for at in (0.1, 0.5, 0.9)},
    "a byte longer": lambda file: file.write_bytes(file.read_bytes() + b"\0") and None,
    "a directory": replace_by_directory,
    "a link to elsewhere": replace_by_link,
}


def change_manifest(change: Callable[[dict], object], *, sign: bool = True) -> Callable[[Path], None]:
    """Change the contents of the manifest, with a right checksum as somebody would who does it on purpose."""

    def damage(checkpoint: Path) -> None:
        file = checkpoint / "manifest.json"
        written = json.loads(file.read_text())
        recorded = written.pop("xxh3")
        change(written)
        file.write_text(json.dumps({**written, "xxh3": manifests._checksum(written) if sign else recorded}))

    return damage


def interrupt_copy(checkpoint: Path) -> None:
    for name in FILES[1:]:
        (checkpoint / name).unlink()


def empty(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()


def replace_by_file(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    checkpoint.write_text("")


def swap_shards(checkpoint: Path) -> None:
    first, second = (checkpoint / name for name in FILES[:2])
    contents = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(contents)


def mix_with_older(checkpoint: Path) -> None:
    shutil.copyfile(checkpoint.with_name("step-6") / FILES[0], checkpoint / FILES[0])


WHOLE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "empty folder": ("manifest.json is missing", empty),
    "interrupted copy": ("manifest.json is missing", interrupt_copy),
    "a file in its place": ("step-8", replace_by_file),
    "shards swapped": ("safetensors has", swap_shards),
    "a shard of an older checkpoint": ("rank-00000.safetensors has", mix_with_older),
    "manifest of another checksum": (
        "manifest.json has another checksum",
        change_manifest(lambda written: written["mesh"].update(shard=4), sign=False),
    ),
    "manifest is a list": ("manifest.json is not", lambda path: (path / "manifest.json").write_text("[]") and None),
    "manifest nested too deeply": (
        "manifest.json is not",
        lambda path: (path / "manifest.json").write_text("[" * 100_000) and None,
    ),
    **{
        f"manifest lists {name!r}": (
            repr(name),
            change_manifest(lambda written, name=name: written["files"].update({name: written["files"][FILES[0]]})),
        )
        for name in ("../../config.json", "/etc/passwd", "", "..", "a/b", "a\\b", "a\0b")
    },
    "manifest without files": ("manifest.json is not", change_manifest(lambda written: written.pop("files"))),
}

DAMAGES = {
    **{
        f"{file} {name}": (file, lambda path, f=file, h=how: h(path / f)) for file in FILES for name, how in HOW.items()
    },
    **WHOLE,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_named_and_passed_over(kind, run) -> None:
    expected, damage = DAMAGES[kind]
    checkpoint = run / "checkpoints" / "step-8"
    damage(checkpoint)
    for read in (check_checkpoint, load, lambda path: export_checkpoint(path, path.parent / "hf")):
        with pytest.raises(ValueError) as error:
            read(checkpoint)
        assert expected in str(error.value) and "step-8" in str(error.value)
        assert ("step-6, the one before" in str(error.value)) or not checkpoint.is_dir()
    start, (warning,) = pass_over_damage(RunDirectory(run), contents=True, host=HostGroup())
    assert start == run / "checkpoints" / "step-6"
    assert expected in warning and "step-8 is damaged" in warning and "renamed to" in warning
    assert (run / "checkpoints" / "step-8.damaged").exists()
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-3", "step-6"]


def test_there_are_forty_kinds_of_damage() -> None:
    assert len(DAMAGES) >= 40


@pytest.mark.parametrize("file", [FILES[0], "state.json"])
def test_a_run_continues_from_the_checkpoint_before_with_the_same_numbers(file, source, written, tmp_path) -> None:
    directory = Path(shutil.copytree(written, tmp_path / "run"))
    flip(0.5)(directory / "checkpoints" / "step-8" / file)
    flip(0.7)(directory / "checkpoints" / "step-6" / file)
    outputs = run_on_ranks(2, train_on, small_run(directory, source, checkpoint__keep=3), join=False)
    assert "continued from step-3" in outputs[0] and not outputs[1]
    assert outputs[0].count("is damaged") == 2
    assert rows_of(directory) == rows_of(written)
    assert all(torch.equal(weight, weights_of(written)[name]) for name, weight in weights_of(directory).items())
    names = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert names == ["step-3", "step-6", "step-6.damaged", "step-8", "step-8.damaged"]


def test_a_run_without_a_whole_checkpoint_starts_again(source, tmp_path) -> None:
    directory = tmp_path / "run"
    run = small_run(directory, source, checkpoint__keep=1)
    train_quietly(run)
    before = rows_of(directory)
    for _ in range(2):
        empty(directory / "checkpoints" / f"step-{STEPS}")
        assert "starts again from step 0" in train_quietly(run)
        assert rows_of(directory) == before
    names = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert names == ["step-8", "step-8.damaged", "step-8.damaged-2"]


def test_a_path_that_is_damaged_is_refused(source, run) -> None:
    checkpoint = run / "checkpoints" / "step-8"
    flip(0.5)(checkpoint / FILES[0])
    with pytest.raises(Damaged, match="other contents"):
        train_quietly(small_run(run, source, checkpoint__resume=str(checkpoint)))
    assert checkpoint.is_dir()


def test_without_verification_contents_are_not_read(source, run) -> None:
    flip(0.9)(run / "checkpoints" / "step-8" / FILES[0])
    start, warnings = pass_over_damage(RunDirectory(run), contents=False, host=HostGroup())
    assert start == run / "checkpoints" / "step-8" and not warnings
    (run / "checkpoints" / "step-8" / FILES[0]).unlink()
    start, warnings = pass_over_damage(RunDirectory(run), contents=False, host=HostGroup())
    assert start == run / "checkpoints" / "step-6" and len(warnings) == 1


def test_an_error_of_the_file_system_is_no_damage(run, monkeypatch) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(manifests, "checksum_of", fail)
    with pytest.raises(OSError, match="Input/output error"):
        pass_over_damage(RunDirectory(run), contents=True, host=HostGroup())
    assert (run / "checkpoints" / "step-8").is_dir()


def test_a_checkpoint_of_a_newer_version_is_no_damage(run) -> None:
    change_manifest(lambda written: written.update(version=4))(run / "checkpoints" / "step-8")
    with pytest.raises(ValueError, match=r"version 4 of the format.*reads up to 3: update Sightline"):
        pass_over_damage(RunDirectory(run), contents=True, host=HostGroup())
    assert (run / "checkpoints" / "step-8").is_dir()


def check_shares(rank: int, checkpoint: Path) -> list[str]:
    """Return the files whose contents this rank reads."""
    read: list[str] = []
    checksum = manifests.checksum_of
    manifests.checksum_of = lambda path: read.append(path.name) or checksum(path)
    check_checkpoint(checkpoint, host=HostGroup())
    return read


def test_ranks_share_the_work_of_verification(written) -> None:
    checkpoint = written / "checkpoints" / "step-8"
    shares = run_on_ranks(2, check_shares, checkpoint)
    assert sorted(shares[0] + shares[1]) == sorted(read_manifest(checkpoint).files)
    assert FILES[0] in shares[0] and FILES[1] in shares[1]
