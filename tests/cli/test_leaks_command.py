"""`sightline leaks --hf MODEL`: table, files and exit codes."""

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from sightline.cli import leaks as command
from sightline.cli.main import run
from sightline.hf.calls import CALLS
from sightline.hf.loading import load_model
from tests.support.hf_models import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("qwen3")
    tiny_model("qwen3").save_pretrained(directory)
    return str(directory)


def test_leak_ends_with_1_and_names_the_layer(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    target = tmp_path / "new" / "leaks.json"
    with pytest.raises(SystemExit) as ended:
        run(["leaks", "--hf", model, "--attention", "eager", "--json", str(target)])
    assert ended.value.code == 1
    out = capsys.readouterr().out
    assert out.startswith("Qwen3ForCausalLM, attention eager: 2 of 5 calls leak, 0 refused\n")
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "model.layers.0.self_attn (attention)" in lines["position_ids"] and "no leak" in lines["no_cache"]
    values = json.loads(target.read_text())
    assert values["leaks"] and [one["call"] for one in values["calls"]] == list(CALLS)[:5]


def test_no_leak_ends_with_0(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["leaks", "--hf", model, "--enable", "--calls", "document_ids", "position_ids"]) == 0
    out = capsys.readouterr().out
    assert "attention sightline, enabled: 0 of 2 calls leak" in out and "cu_seq_lens" not in out
    assert run(["leaks", "--hf", model, "--attention", "sightline", "--calls", "position_ids"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calls", "nothing"], "unknown calls nothing; the calls are: position_ids, "),
        (["--enable", "--attention", "eager"], "--enable sets the attention sightline, so --attention eager"),
        (["--attention", "nothing"], r"nothing"),
    ],
)
def test_wrong_options_end_with_2(
    model: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["leaks", "--hf", model, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_directory_without_a_model_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["leaks", "--hf", str(tmp_path)]) == 2
    assert f"cannot load {tmp_path}: expected a directory that save_pretrained" in capsys.readouterr().err


def test_name_that_is_not_in_the_cache_without_a_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network(_name: str) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nto load the files")

    monkeypatch.setattr(AutoConfig, "from_pretrained", no_network)
    assert run(["leaks", "--hf", "some/model"]) == 2
    assert "We couldn't connect to 'https://huggingface.co' to load the files" in capsys.readouterr().err


def test_transformers_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda _name: None)
    assert run(["leaks", "--hf", "some/model"]) == 2
    assert "pip install 'sightline[hf]'" in capsys.readouterr().err


def test_class_that_the_config_names_is_loaded(tmp_path: Path) -> None:
    sections = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    tiny_model("Qwen2_5_VLForConditionalGeneration", rope_parameters=sections).save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), "eager")
    assert type(loaded).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert loaded.config._attn_implementation == "eager"


def test_help_describes_every_call(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(["leaks", "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in CALLS)
