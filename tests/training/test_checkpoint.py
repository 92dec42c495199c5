"""Checkpoints: loading restores what was saved, and incomplete checkpoints raise errors."""

import dataclasses
import errno
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sightline import Batch
from sightline.config import CheckpointConfig, OptimizerConfig
from sightline.models import build_model
from sightline.parallel.parallel_model import single_process_model
from sightline.training import checkpoint as checkpoints
from sightline.training.checkpoint import (
    CannotSave,
    Progress,
    check_checkpoint,
    load_checkpoint,
    local_state,
    save_checkpoint,
    tensors,
)
from sightline.training.checkpoint_directory import find_latest, list_checkpoints, remove_partial
from sightline.training.manifest import checksum_of, read_manifest
from sightline.training.optimizer import build_optimizer, optimizer_state
from sightline.training.saver import Saver
from sightline.training.step import train_step
from tests.support.small_runs import MODEL

CPU = torch.device("cpu")
LOADER = {"identity": {"seed": 0}, "step": 2, "shards": {"0": {"epoch": 1, "place": 7, "waiting": [[3, 40]]}}}


def build(seed: int, config=MODEL):
    torch.manual_seed(seed)
    model = build_model(config)
    return model, build_optimizer(model, OptimizerConfig())


def trained(seed: int = 0, config=MODEL):
    model, optimizer = build(seed, config)
    batch = Batch.from_documents([[1, 2, 3, 4, 5], [6, 7, 8]], length=8)
    for _ in range(2):
        train_step(single_process_model(model), optimizer, batch, None, micro_batch_size=1, max_grad_norm=1.0)
    return model, optimizer


def save(directory: Path, model, optimizer, step: int = 2, keep: int = 2) -> Path:
    run_file = directory.parent / "config.json"
    run_file.write_text("{}")
    local = local_state(tensors(model, optimizer, CPU), Progress(step, LOADER))
    return save_checkpoint(directory, local, [run_file], keep=keep)


@pytest.mark.parametrize("config", [MODEL, dataclasses.replace(MODEL, tied_embeddings=True)], ids=["untied", "tied"])
def test_loading_restores_what_was_saved(config, tmp_path) -> None:
    model, optimizer = trained(config=config)
    saved = save(tmp_path / "checkpoints", model, optimizer)
    expected = torch.rand(3)
    other, other_optimizer = build(1, config)
    progress = load_checkpoint(saved, tensors(other, other_optimizer, CPU), CPU)
    assert progress == Progress(2, LOADER)
    assert torch.equal(torch.rand(3), expected), "the random number state is restored"
    for name, weight in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight), name
    theirs = optimizer_state(other, other_optimizer)
    for name, state in optimizer_state(model, optimizer).items():
        assert state["step"] == 2
        for key, value in state.items():
            assert torch.equal(theirs[name][key], value), (name, key)


def test_optimizer_options_come_from_the_config(tmp_path) -> None:
    saved = save(tmp_path / "checkpoints", *trained())
    model, _ = build(1)
    optimizer = build_optimizer(model, OptimizerConfig(weight_decay=0.7))
    load_checkpoint(saved, tensors(model, optimizer, CPU), CPU)
    assert optimizer.param_groups[0]["weight_decay"] == 0.7


def test_newest_checkpoints_are_kept_in_numeric_order(tmp_path) -> None:
    directory = tmp_path / "checkpoints"
    model, optimizer = trained()
    for step in (8, 9, 10, 11):
        save(directory, model, optimizer, step, keep=2)
    assert [path.name for path in list_checkpoints(directory)] == ["step-10", "step-11"]
    assert find_latest(directory) == directory / "step-11"
    assert sorted(path.name for path in directory.iterdir()) == ["step-10", "step-11"]
    assert find_latest(tmp_path / "nothing") is None


def test_partial_directories_are_no_checkpoints_and_are_removed(tmp_path) -> None:
    directory = tmp_path / "checkpoints"
    saved = save(directory, *trained())
    (directory / ".step-5.partial").mkdir()
    (directory / ".step-5.partial" / "rank-00000.safetensors").write_bytes(b"half")
    assert find_latest(directory) == saved
    remove_partial(directory)
    assert [path.name for path in directory.iterdir()] == ["step-2"]


def test_not_a_checkpoint_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        check_checkpoint(tmp_path)


def test_another_shape_is_refused(tmp_path) -> None:
    saved = save(tmp_path / "checkpoints", *trained())
    wider = dataclasses.replace(MODEL, intermediate_size=96)
    expected = r"cannot be read: model.*has the shape \[32, 64\], expected \[32, 96\]; expected a checkpoint"
    with pytest.raises(ValueError, match=expected):
        load_checkpoint(saved, tensors(*build(1, wider), CPU), CPU)


def test_the_manifest_lists_every_file(tmp_path) -> None:
    saved = save(tmp_path / "checkpoints", *trained())
    listed = read_manifest(saved).files
    there = {file.name: file for file in saved.iterdir() if file.name != "manifest.json"}
    assert {name: entry.bytes for name, entry in listed.items()} == {n: f.stat().st_size for n, f in there.items()}
    assert {name: entry.xxh3 for name, entry in listed.items()} == {n: checksum_of(f) for n, f in there.items()}
    assert sorted(listed) == ["config.json", "rank-00000.safetensors", "state.json"]


def test_safetensors_reads_the_shards(tmp_path) -> None:
    model, optimizer = trained()
    stored = load_file(save(tmp_path / "checkpoints", model, optimizer) / "rank-00000.safetensors")
    assert {name for name in stored if name.startswith("model.")} == {f"model.{name}" for name in model.state_dict()}
    assert all(torch.equal(stored[f"model.{name}"], weight) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("where", ["write_shards", "write_file", "sync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_a_full_disk_leaves_the_old_checkpoints(where, number, tmp_path, monkeypatch) -> None:
    directory = tmp_path / "checkpoints"
    model, optimizer = trained()
    saved = save(directory, model, optimizer, 2)

    def full(*_, **__):
        raise OSError(number, "no room")

    monkeypatch.setattr(checkpoints, where, full)
    with pytest.raises(CannotSave, match="no room") as error:
        save(directory, model, optimizer, 4)
    assert error.value.errno == number
    monkeypatch.undo()
    assert [path.name for path in directory.iterdir()] == ["step-2"]
    load_checkpoint(saved, tensors(*build(1), CPU), CPU)
    save(directory, model, optimizer, 4)
    assert find_latest(directory).name == "step-4"


def test_the_verified_checkpoint_is_kept_besides_the_newest(tmp_path) -> None:
    directory = tmp_path / "checkpoints"
    model, optimizer = trained()
    saver = Saver(directory, [], CheckpointConfig(every=1, keep=1), print)
    saver.verified = directory / "step-2"
    for step in (1, 2, 3, 4):
        saver.save(tensors(model, optimizer, CPU), Progress(step, LOADER))
    assert [path.name for path in list_checkpoints(directory)] == ["step-2", "step-4"]
