"""Directories that others wrote: what they name, link to or ask for is refused in words, before files or memory are
touched, by each command that reads them."""

import contextlib
import dataclasses
import json
import math
import os
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from sightline.cli.main import run
from sightline.config.checks import LIMITS, types_of
from sightline.data import Documents, train_tokenizer
from sightline.models import MODELS, build_model, load_pretrained, save_pretrained
from sightline.models.hf.source import COPIED_FILES, read_model_config
from sightline.training.run_directory import load_config, settings
from tests.support.small_runs import rewrite_manifest, small_run, write_corpus

INDEX = "model.safetensors.index.json"
DEBUG = [name for name in MODELS if name.endswith("-debug")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A Hugging Face directory with a tokenizer, in a folder with a file outside it."""
    (tmp_path / "secret").write_text("TOP-SECRET")
    path = tmp_path / "model"
    save_pretrained(build_model("llama3-debug"), path)
    train_tokenizer(Documents.from_texts(["one two three"]), 300).save(path / "tokenizer.json")
    return path


def edit(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **fields}))


def list_in_index(directory: Path, file: Any) -> None:
    """Write an index that lists all tensors in `file`."""
    names = safetensors.torch.load_file(directory / "model.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


def replace_by_link(directory: Path, name: str, target: str = "../secret") -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(target)


def replace_by_pipe(directory: Path, name: str) -> None:
    (directory / name).unlink()
    os.mkfifo(directory / name)


def replace_by_pickle(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "index, parent": (lambda d: list_in_index(d, "../model/model.safetensors"), "plain name of a file"),
    "index, absolute": (lambda d: list_in_index(d, "/etc/passwd"), "names the file '/etc/passwd'; expected the plain"),
    "index, empty name": (lambda d: list_in_index(d, ""), "names the file ''; expected the plain"),
    "index, NUL": (lambda d: list_in_index(d, "a\0b"), "expected the plain name"),
    "index, directory": (lambda d: list_in_index(d, ".."), "expected the plain name"),
    "index, number": (lambda d: list_in_index(d, 3), "is damaged: expected the name of a file for each tensor"),
    "index, list": (lambda d: (d / INDEX).write_text("[]"), "contains a JSON list; expected an object"),
    "index, link": (lambda d: replace_by_link(d, INDEX), "is a link to .*secret, outside"),
    "weights, link": (
        lambda d: (
            (d / "model.safetensors").rename(d.parent / "weights"),
            replace_by_link(d, "model.safetensors", "../weights"),
        ),
        "model.safetensors is a link to .* outside .* replace the link by a copy",
    ),
    "config, link": (lambda d: replace_by_link(d, "config.json"), "config.json is a link to .* outside"),
    "config, pipe": (lambda d: replace_by_pipe(d, "config.json"), "config.json is not a regular file"),
    "tokenizer, link": (lambda d: replace_by_link(d, "tokenizer.json"), "tokenizer.json is a link to .* outside"),
    "tokenizer, pipe": (lambda d: replace_by_pipe(d, "tokenizer.json"), "tokenizer.json is not a regular file"),
    "tokenizer config, link": (lambda d: replace_by_link(d, "tokenizer_config.json"), "is a link to .* outside"),
    "tokenizer config, list": (lambda d: (d / "tokenizer_config.json").write_text("[]"), "contains a JSON list"),
    "tokenizer config, number": (
        lambda d: (d / "tokenizer_config.json").write_text('{"eos_token": 7}'),
        "has eos_token 7; expected the text of a token",
    ),
    "pickle only": (
        replace_by_pickle,
        "contains no weights; .*pytorch_model.bin is not read, because loading it can run",
    ),
    "config, list": (lambda d: (d / "config.json").write_text("[1]"), "config.json contains a JSON list"),
    "config, deeply nested": (lambda d: (d / "config.json").write_text("[" * 10**6), "is not JSON .*too deeply nested"),
    "config, long integer": (
        lambda d: (d / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "n": %s}' % ("9" * 10**5)),
        "is not JSON .*digits",
    ),
    "config, 1 GB": (lambda d: os.truncate(d / "config.json", 10**9), "has 1,000,000,000 bytes; expected at most"),
    "tokenizer, 1 GB": (lambda d: os.truncate(d / "tokenizer.json", 10**9), "has 1,000,000,000 bytes; expected"),
    "many layers": (
        lambda d: edit(d, num_hidden_layers=10**8),
        "num_hidden_layers in config.json is 100000000; expected at most",
    ),
    "wide": (
        lambda d: edit(d, hidden_size=2**40),
        "hidden_size in config.json is 1099511627776; expected at most 1048576",
    ),
    "vocabulary": (lambda d: edit(d, vocab_size=2**50), "vocab_size in config.json is .*; expected at most 67108864"),
    "no heads": (lambda d: edit(d, num_attention_heads=0), "model.num-heads must be greater than 0, got 0"),
    "negative": (lambda d: edit(d, vocab_size=-5), "model.vocab-size must be greater than 0, got -5"),
    "fraction": (lambda d: edit(d, hidden_size=64.5), r"hidden_size in config.json is 64\.5; expected an integer"),
    "text": (
        lambda d: edit(d, intermediate_size="128"),
        "intermediate_size in config.json is '128'; expected an integer",
    ),
    "null": (lambda d: edit(d, num_hidden_layers=None), "model.num-layers is None; expected an integer"),
    "true": (
        lambda d: edit(d, num_hidden_layers=True),
        "num_hidden_layers in config.json is True; expected an integer",
    ),
    "infinite": (lambda d: edit(d, rms_norm_eps=math.inf), "model.norm-eps must be a finite number, got inf"),
    "architectures": (lambda d: edit(d, architectures=3), "architectures is 3; expected a list such as"),
    "RoPE": (lambda d: edit(d, rope_scaling=[1]), r"rope_scaling in config.json is \[1\]; expected an object"),
    "quantization": (lambda d: edit(d, quantization_config="x"), "quantization_config in config.json is 'x'"),
    "hundred times the weights": (
        lambda d: edit(d, hidden_size=6400),
        r"has shape \(512, 64\); expected \(512, 6400\)",
    ),
    "more layers than weights": (lambda d: edit(d, num_hidden_layers=2000), r"lack model.layers.2.* \(and 999 more\)"),
}


def commands(directory: Path, output: Path, corpus: Path) -> list[list[str]]:
    """Return the commands that read the weights and the tokenizer of a Hugging Face directory."""
    train = ["train", "llama3-debug", "--model-from", str(directory), "--output-dir", str(output / "run")]
    return [
        ["generate", str(directory), "--device", "cpu"],
        ["convert", str(directory), str(output / "converted")],
        [*train, "--data.source", str(corpus), "--training.device", "cpu"],
    ]


NOT_READ_BY_CONVERT = ("tokenizer config, list", "tokenizer config, number", "tokenizer, 1 GB")
"""Contents of a tokenizer, which `convert` copies."""


@pytest.mark.parametrize("case", HOSTILE)
def test_every_command_refuses_a_hostile_directory_by_name(
    case: str, directory: Path, corpus: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = HOSTILE[case]
    change(directory)
    monkeypatch.setattr(torch.nn.Module, "to_empty", lambda *_, **__: pytest.fail("memory was allocated"))
    for command in commands(directory, directory.parent / "output", corpus):
        if command[0] != "convert" or case not in NOT_READ_BY_CONVERT:
            assert run(command) == 2, command
            error = capsys.readouterr().err
            assert re.search(message, error) and "Traceback" not in error, f"{command[0]}: {error}"
    assert not (directory.parent / "output" / "converted").exists()


@pytest.mark.parametrize("name", COPIED_FILES)
def test_copied_files_are_plain_files_of_the_source(name: str, directory: Path, tmp_path: Path) -> None:
    replace_by_link(directory, name)
    with pytest.raises(ValueError, match=rf"{name} is a link to .*secret, outside"):
        save_pretrained(build_model("llama3-debug"), tmp_path / "copy", source=directory)
    assert not list((tmp_path / "copy").glob("*")), "neither a copy nor a temporary directory"


def test_files_of_a_hugging_face_cache_are_links_to_its_blobs(directory: Path, tmp_path: Path) -> None:
    model = tmp_path / "models--a--b"
    snapshot = model / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    directory.rename(model / "blobs")
    for file in (model / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    save_pretrained(load_pretrained(snapshot), tmp_path / "copy", source=snapshot)
    assert {"tokenizer.json", "model.safetensors", "config.json"} <= {
        file.name for file in (tmp_path / "copy").iterdir()
    }


BAD = (None, True, "x", "8", 1.5, -1, 0, 10**8, 2**60, 10**400, [], [1], {}, {"a": 1}, math.nan, math.inf)


def fields_of(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every value in nested dicts."""
    if path:
        yield path
    for name, item in value.items() if isinstance(value, dict) else ():
        yield from fields_of(item, (*path, name))


def with_value(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    head, *rest = path
    return {**config, head: with_value(config[head], tuple(rest), value) if rest else value}


@pytest.mark.parametrize("name", DEBUG)
def test_any_value_of_any_field_of_a_published_config_is_accepted_or_refused(name: str, tmp_path: Path) -> None:
    """Any other error than ValueError is a traceback for the user."""
    save_pretrained(build_model(name), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "attention_factor": 1.0}
    config = {"layer_types": None, "no_rope_layers": [], "mlp_only_layers": [], **config, "torch_dtype": "float32"}
    config |= {"rope_parameters" if name == "llama3-debug" else "rope_scaling": scaling}
    for path in fields_of(config):
        for value in BAD:
            (tmp_path / "config.json").write_text(json.dumps(with_value(config, path, value)))
            with contextlib.suppress(ValueError):
                model = read_model_config(tmp_path)
                sizes = {field: getattr(model, field) for field in LIMITS if hasattr(model, field)}
                assert all(size is None or size <= LIMITS[field] for field, size in sizes.items())


@pytest.mark.parametrize("name", DEBUG)
def test_any_value_of_any_field_of_the_config_of_a_run_is_accepted_or_refused(name: str, tmp_path: Path) -> None:
    config = settings(dataclasses.replace(small_run(tmp_path, tmp_path), model=MODELS[name]))
    sections = {"model"} if name != "llama3-debug" else set(config)
    for path in fields_of({section: config[section] for section in config if section in sections}):
        for value in BAD:
            (tmp_path / "config.json").write_text(json.dumps(with_value(config, path, value)))
            with contextlib.suppress(ValueError):
                load_config(tmp_path / "config.json")


def test_every_integer_of_a_model_config_has_a_limit_that_leaves_room() -> None:
    configs = [config for config in MODELS.values()]
    configs += [config.vision for config in configs if hasattr(config, "vision")]
    for config in configs:
        for field, kind in types_of(type(config)).items():
            if int in (kind, *typing.get_args(kind)):
                assert 10 * (getattr(config, field) or 0) <= LIMITS[field], f"{type(config).__name__}.{field}"


def test_export_reads_no_directory_that_the_config_of_a_run_names(
    directory: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """A run copies the tokenizer files of --model-from when the user names it; later commands use the copies."""
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    edit(directory, max_position_embeddings=77, eos_token_id=[1, 2])
    train = commands(directory, tmp_path, corpus)[2]
    short = ["--training.steps", "1", "--training.sequence-length", "16", "--logging.sample-tokens", "0"]
    assert run([*train, *short, "--logging.no-tensorboard"]) == 0
    moved = tmp_path / "moved"
    next((tmp_path / "run" / "checkpoints").iterdir()).rename(moved)
    (directory / "chat_template.jinja").write_text("TOP-SECRET")
    (directory / "generation_config.json").write_text("{}")
    assert run(["convert", str(moved), str(tmp_path / "out")]) == 0
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["eos_token_id"]) == (77, [1, 2])

    config = json.loads((moved / "config.json").read_text())
    refusals = {6400: "MiB of weights; expected the config.json", 2**40: "hidden_size must be at most"}
    for hidden_size, message in refusals.items():
        (moved / "config.json").write_text(json.dumps(with_value(config, ("model", "hidden_size"), hidden_size)))
        rewrite_manifest(moved)
        assert run(["generate", str(moved), "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err
