"""config.json stores the full config and loads again; only one process trains in a directory."""

import dataclasses
import json
from pathlib import Path

import pytest

from sightline.config import DataConfig, LoggingConfig, Run
from sightline.models.llama3 import LLAMA3
from sightline.recipes import RECIPES
from sightline.training.run_directory import RunDirectory, decode, encode, find_checkpoint, load_config, settings
from tests.support.small_runs import MODEL, small_run


def through_json(run: Run, path: Path) -> Run:
    path.write_text(json.dumps(settings(run)))
    return load_config(path)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_round_trips_through_json(name, tmp_path) -> None:
    run = dataclasses.replace(
        RECIPES[name],
        data=DataConfig(tokenizer=Path("a/tokenizer.json")),
        logging=LoggingConfig(wandb="p"),
        output_dir=Path("x/y"),
    )
    back = through_json(run, tmp_path / "config.json")
    assert back == run
    assert type(back.model) is type(run.model)
    assert isinstance(back.output_dir, Path) and isinstance(back.data.tokenizer, Path)
    assert isinstance(back.optimizer.betas, tuple)


def test_json_is_readable(tmp_path) -> None:
    written = settings(small_run(tmp_path, tmp_path))
    assert written["family"] == "llama3"
    assert written["model"]["hidden_size"] == 32
    assert written["training"]["sequence_length"] == 48
    assert written["optimizer"]["betas"] == [0.9, 0.95]


def test_a_missing_field_takes_its_default() -> None:
    written = encode(MODEL)
    del written["rope_theta"]
    assert decode(type(MODEL), written, "config.json") == MODEL


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(ValueError, match=r"config\.json: data has the field 'color', which this version does not know"):
        decode(Run, {"model": MODEL, "data": {"color": "red"}}, "config.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model_type": "llama"}'])
def test_another_config_json_is_refused(text, tmp_path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not the config of a run.*`sightline train`"):
        load_config(tmp_path / "config.json")


def test_an_unknown_family_is_named(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"family": "llama9", "model": {}}')
    with pytest.raises(ValueError, match=r"model family 'llama9'; this version knows llama3"):
        load_config(tmp_path / "config.json")


def test_a_family_that_is_not_imported_is_refused_unless_it_is_given(tmp_path) -> None:
    """For families outside the package, see tests/test_adding_a_model.py."""
    path = tmp_path / "config.json"
    written = {**settings(small_run(tmp_path, tmp_path)), "family": "no.such:FAMILY"}
    path.write_text(json.dumps(written))
    with pytest.raises(ValueError, match=r"'no.such:FAMILY'; it is defined outside .* --family no.such:FAMILY"):
        load_config(path)
    assert load_config(path, LLAMA3) == small_run(tmp_path, tmp_path)


def test_a_directory_without_checkpoints_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        find_checkpoint(tmp_path / "nothing")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        find_checkpoint(tmp_path)


def test_only_one_process_trains_in_a_directory(tmp_path) -> None:
    """The lock belongs to the open file, so one process is enough to test it."""
    directory = RunDirectory(tmp_path / "run")
    with directory.lock(), pytest.raises(ValueError, match=r"another process is training in .*--output-dir"):
        directory.lock()
    directory.lock().close()
