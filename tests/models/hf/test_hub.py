"""Models named as on the Hugging Face Hub; its functions are replaced, since tests have no connection."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors, hf_api

import sightline
from sightline.cli.main import run
from sightline.cli.train import parse
from sightline.data import Documents, train_tokenizer
from sightline.models import build_model, load_pretrained, save_pretrained
from sightline.models.hf.hub import download, is_hub_name
from sightline.models.hf.source import find_pretrained, read_config

NAME = "someone/Tiny-0.1"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    download.cache_clear()
    yield
    download.cache_clear()


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that answers."""
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each download of a Hub that has one model."""
    snapshot = tmp_path / "cache" / "models--someone--Tiny-0.1" / "snapshots" / "0123"
    save_pretrained(build_model("llama3-debug"), snapshot)
    train_tokenizer(Documents.from_texts(["one two three"]), 300).save(snapshot / "tokenizer.json")
    made: list[dict[str, Any]] = []

    def snapshot_download(name: str, **options: Any) -> str:
        made.append({"name": name, **options})
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return made


def test_hub_names_are_told_from_paths(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    names = {name: is_hub_name(Path(name)) for name in ("Qwen/Qwen3-0.6B", "a/b", "runs/tiny", "runs", "/a/b", "a/b/c")}
    assert names == {
        "Qwen/Qwen3-0.6B": True,
        "a/b": True,
        **dict.fromkeys(("runs/tiny", "runs", "/a/b", "a/b/c"), False),
    }
    assert not any(is_hub_name(Path(name)) for name in ("../b", "./b", "~/b", "a b/c", "-a/b", "a/", "$a/b"))


def test_every_command_downloads_a_model_once(downloads: list[dict[str, Any]], tmp_path: Path, capsys: Any) -> None:
    assert run(["generate", NAME, "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert run(["convert", NAME, str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy" / "tokenizer.json").is_file()
    assert load_pretrained(NAME).config == sightline.load(NAME, device="cpu").model.config
    assert [made["allow_patterns"] == ["config.json"] for made in downloads] == [True, False]
    assert all(made["name"] == NAME for made in downloads)


def test_only_the_config_is_downloaded_until_the_model_is_known_to_be_supported(
    downloads: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = parse(["llama3-debug", "--model-from", NAME])
    assert (model.model_from, model.model) == (Path(NAME), load_pretrained(find_pretrained(NAME)).config)
    assert downloads[0]["allow_patterns"] == ["config.json"] and len(downloads) == 2
    config = next((tmp_path / "cache").glob("*/snapshots/*/config.json"))
    config.write_text('{"architectures": ["Gpt2"]}')
    download.cache_clear()
    with pytest.raises(ValueError, match="contains a Gpt2, which is not supported"):
        find_pretrained(NAME)
    assert len(downloads) == 3


def http_error(kind: Any) -> Exception:
    return kind("the text of the server", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            lambda: http_error(errors.GatedRepoError),
            r"it is gated: accept its terms on https://.*/someone/Tiny-0\.1, run",
        ),
        (lambda: http_error(errors.RepositoryNotFoundError), "has no model of that name: check the spelling"),
        (lambda: OSError(28, "No space left on device"), r"cannot be downloaded .*No space left on device\)"),
        (
            lambda: errors.LocalEntryNotFoundError("offline\nmore"),
            r"\(offline\)\. .*`hf download someone/Tiny-0\.1 --local",
        ),
        (lambda: RuntimeError("no route"), r"cannot be downloaded from the Hugging Face Hub \(no route\)"),
    ],
)
def test_a_failed_download_is_explained_in_one_line(
    error: Any, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def snapshot_download(name: str, **options: Any) -> str:
        raise error()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(ValueError, match=rf"^{NAME} is no directory here, and .*{message}"):
        read_config(Path(NAME))
    assert run(["generate", NAME]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_processes_of_a_machine_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Threads stand for processes: a lock on a file is held by the open file."""
    active, most = [], []

    def snapshot_download(name: str, **options: Any) -> str:
        active.append(name)
        most.append(len(active))
        time.sleep(0.05)
        active.pop()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    threads = [threading.Thread(target=download.__wrapped__, args=(NAME, ("config.json",))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


def test_a_hub_that_does_not_answer_is_left_for_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`snapshot_download` itself has no timeout, so the first request to the Hub is another one."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.undo()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        answer = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hf_api.HfApi(endpoint=answer))
        monkeypatch.setattr("sightline.models.hf.hub.TIMEOUT", 0.2)
        found = []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: found.append(options) or "d")
        assert download.__wrapped__(NAME, ("config.json",)) == Path("d")
        assert [options["local_files_only"] for options in found] == [True]

        def snapshot_download(name: str, **options: Any) -> str:
            raise errors.LocalEntryNotFoundError("not in the cache")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        with pytest.raises(ValueError, match=r"cannot be downloaded .*timed out.*run `hf download"):
            download.__wrapped__(NAME, ("config.json",))
