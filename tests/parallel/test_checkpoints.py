"""Checkpoints saved on one mesh and loaded on another, and checkpoints that one rank fails to write or read."""

import dataclasses
import json
import math
import resource
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from sightline.config import CheckpointConfig, ParallelConfig, Run
from sightline.models import build_model, load_pretrained, save_pretrained
from sightline.models.hf import files
from sightline.models.hf.directory import read_pretrained
from sightline.parallel.apply import build_parallel
from sightline.parallel.host import HostGroup
from sightline.parallel.mesh import Mesh
from sightline.training.checkpoint import CannotSave, Progress, check_checkpoint, tensors
from sightline.training.checkpoint_directory import list_checkpoints
from sightline.training.export import export_checkpoint
from sightline.training.metrics import read_metrics
from sightline.training.optimizer import build_optimizer
from sightline.training.saver import Saver
from tests.parallel.test_meshes import ILL_CONDITIONED, small_run, train_on
from tests.support.processes import run_on_ranks
from tests.support.small_runs import weights_of, write_corpus

CPU = torch.device("cpu")
COMPARED = ("loss", "grad_norm", "visible_pairs", "tokens")
Degrees = dict[str, int]


def world_size(degrees: Degrees) -> int:
    return math.prod(degree for axis, degree in degrees.items() if axis != "expert")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "texts")


def run_of(
    directory: Path,
    source: Path,
    family: str,
    degrees: Degrees,
    steps: int = 6,
    optimizer: Any = "adamw",
    **checkpoint: Any,
) -> Run:
    """Return a run whose learning rate does not depend on the number of steps."""
    run = small_run(directory, source, family, ParallelConfig(**degrees))
    return dataclasses.replace(
        run,
        training=dataclasses.replace(run.training, steps=steps),
        optimizer=dataclasses.replace(run.optimizer, name=optimizer, schedule="wsd", decay_ratio=0.0),
        validation=dataclasses.replace(run.validation, every=0),
        checkpoint=CheckpointConfig(**{"every": 0, **checkpoint}),
        logging=dataclasses.replace(run.logging, sample_tokens=0),
    )


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory):
    """Return the directory of a family's uninterrupted run on one process."""
    runs: dict[tuple[str, str], Path] = {}

    def directory(family: str, optimizer: str = "adamw") -> Path:
        key = family, optimizer
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp(family) / "run"
            run_on_ranks(1, train_on, run_of(runs[key], source, family, {}, steps=10, optimizer=optimizer))
        return runs[key]

    return directory


FAST = [
    ("llama3", [{"shard": 2}, {"pipeline": 2}, {"tensor": 2}, {}]),
    ("deepseek_v3", [{"shard": 2, "expert": 2}, {}]),
]
SLOW: list[tuple[str, list[Degrees]]] = [
    ("llama3", [{"shard": 4}, {}, {"shard": 2}, {"replicate": 2, "shard": 2}, {"shard": 2}]),
    ("llama3", [{"shard": 2}, {"tensor": 2}, {"shard": 2, "tensor": 2}, {"pipeline": 2, "shard": 2}, {"replicate": 2}]),
    ("llama4", [{"context": 4}, {"context": 2}, {}]),
    ("deepseek_v3", [{}, {"expert": 2, "shard": 4}, {"pipeline": 2}, {"shard": 2, "tensor": 2}]),
    ("gpt_oss", [{"shard": 2}, {"pipeline": 2}, {}]),
    ("qwen3_next", [{"pipeline": 2}, {"shard": 2}, {}]),
]


MUON = [
    ("llama3", [{}, {"shard": 2}, {"tensor": 2}, {}]),
    ("gpt_oss", [{"shard": 2, "expert": 2}, {}]),
    pytest.param("llama3", [{"shard": 2, "tensor": 2}, {"replicate": 2, "shard": 2}, {}], marks=pytest.mark.slow),
    pytest.param("gpt_oss", [{"shard": 2, "tensor": 2, "expert": 2}, {"pipeline": 2}], marks=pytest.mark.slow),
    pytest.param("deepseek_v3", [{"context": 2}, {"shard": 4}], marks=pytest.mark.slow),
    pytest.param("qwen3_next", [{"shard": 2}, {}], marks=pytest.mark.slow),  # with a matrix of one row
]


def check_chain(
    family: str, chain: list[Degrees], source: Path, directory: Path, uninterrupted: Path, optimizer: str = "adamw"
) -> None:
    """Train two steps on each mesh of a chain, each resumed from the checkpoint of the previous mesh."""
    for number, degrees in enumerate(chain, start=1):
        run = run_of(directory, source, family, degrees, steps=2 * number, optimizer=optimizer)
        (output, *other_outputs) = run_on_ranks(world_size(degrees), train_on, run, join=False)
        assert not any(other_outputs)
        if number > 1:
            assert f"continued from step-{2 * number - 2}" in output
            assert ": the same numbers up to rounding" in output
    rows, expected = read_metrics(directory / "metrics.jsonl"), read_metrics(uninterrupted / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 2 * len(chain) + 1))
    for row, expected_row in zip(rows, expected, strict=False):
        for name in COMPARED:
            tolerance = ILL_CONDITIONED.get((family, name), 1e-5)
            assert row[name] == pytest.approx(expected_row[name], rel=tolerance), (row["step"], name)


@pytest.mark.parametrize(("family", "chain"), FAST, ids=str)
def test_resume_on_another_mesh(family, chain, source, tmp_path, uninterrupted) -> None:
    check_chain(family, chain, source, tmp_path / "run", uninterrupted(family))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "chain"), SLOW, ids=str)
def test_resume_on_any_mesh(family, chain, source, tmp_path, uninterrupted) -> None:
    check_chain(family, chain, source, tmp_path / "run", uninterrupted(family))


@pytest.mark.parametrize(("family", "chain"), MUON, ids=str)
def test_muon_equals_one_process_on_any_mesh(family, chain, source, tmp_path, uninterrupted) -> None:
    check_chain(family, chain, source, tmp_path / "run", uninterrupted(family, "muon"), "muon")


def test_asynchronous_checkpoints_and_final_export(source, tmp_path, uninterrupted) -> None:
    run = run_of(tmp_path / "run", source, "llama3", {"shard": 2}, every=2, keep=5, asynchronous=True, export=True)
    (output, _) = run_on_ranks(2, train_on, run, join=False)
    assert f"exported for transformers: {run.output_dir}/hf/step-6" in output
    expected = read_metrics(uninterrupted("llama3") / "metrics.jsonl")
    found = list_checkpoints(run.output_dir / "checkpoints")
    assert [path.name for path in found] == ["step-2", "step-4", "step-6"]
    assert equal(load_pretrained(f"{run.output_dir}/hf/step-6").state_dict(), weights_of(found[2]))
    resumed = run_of(tmp_path / "resumed", source, "llama3", {}, resume=str(found[0]))
    run_on_ranks(1, train_on, resumed)
    rows = read_metrics(resumed.output_dir / "metrics.jsonl")
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected[2:6]], rel=1e-5)


def export_with_recorded_files(rank: int, checkpoint: Path, output: Path) -> list[str]:
    """Export a checkpoint, and return the weight files that this rank has written."""
    written: list[str] = []

    def save_file(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        written.append(path.name)
        safetensors.torch.save_file(tensors, path, metadata)

    files.save_file = save_file
    export_checkpoint(checkpoint, output, max_shard_bytes=60_000, host=HostGroup())
    return written


def test_ranks_share_the_files_of_an_export(uninterrupted, tmp_path) -> None:
    checkpoint, output = uninterrupted("deepseek_v3") / "checkpoints" / "step-10", tmp_path / "hf"
    first, second = run_on_ranks(2, export_with_recorded_files, checkpoint, output)
    files = sorted(path.name for path in output.glob("*.safetensors"))
    assert files == sorted(first + second) and abs(len(first) - len(second)) <= 1 < len(second)
    assert equal(load_pretrained(output).state_dict(), weights_of(checkpoint))
    assert (output / "tokenizer.json").is_file() and not (output / ".partial").exists()


def equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return actual.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in actual.items())


def build_all(run: Run) -> tuple[Any, Any, Saver]:
    """Return (model, optimizer, saver) of this rank."""
    torch.manual_seed(0)
    mesh = Mesh(run.parallel, CPU)
    model = build_parallel(run.model, run.training, mesh)
    run.output_dir.mkdir(exist_ok=True)
    saver = Saver(run.output_dir / "checkpoints", [], run.checkpoint, print, mesh)
    return model, build_optimizer(model, run.optimizer), saver


def progress(rank: int, step: int) -> Progress:
    return Progress(step, {"identity": {}, "step": step, "shards": {str(10 * rank): {"next_document": step}}})


def save_with_a_full_disk_on_rank_1(rank: int, run: Run) -> list[str]:
    model, optimizer, saver = build_all(run)
    state = tensors(model, optimizer, CPU)
    errors = []

    def attempt(step: int) -> None:
        try:
            saver.start(state, progress(rank, step))
            saver.wait()
            errors.append("")
        except CannotSave as error:
            errors.append(str(error))

    attempt(1)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    attempt(2)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    attempt(3)
    return [*errors, f"newest {saver.newest_step}"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk_on_one_rank_fails_on_all_and_keeps_older_checkpoints(asynchronous, source, tmp_path) -> None:
    run = run_of(tmp_path / "run", source, "llama3", {"shard": 2}, asynchronous=asynchronous)
    errors = run_on_ranks(2, save_with_a_full_disk_on_rank_1, run)
    assert errors[0] == errors[1]
    assert errors[0][0] == errors[0][2] == "" and errors[0][3] == "newest 3"
    assert "rank 1: File too large" in errors[0][1]
    checkpoints = run.output_dir / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-1", "step-3"]
    state = json.loads((checkpoints / "step-3" / "state.json").read_text())
    assert state["loader"]["shards"] == {"0": {"next_document": 3}, "10": {"next_document": 3}}
    manifest = json.loads((checkpoints / "step-3" / "manifest.json").read_text())
    assert {"rank-00000.safetensors", "rank-00001.safetensors"} <= set(manifest["files"])


def load_damaged_checkpoint(rank: int, run: Run) -> str:
    _, _, saver = build_all(run)
    try:
        check_checkpoint(run.output_dir / "checkpoints" / "step-1", host=saver.host)
    except ValueError as error:
        return str(error)
    return "loaded"


def test_damaged_file_of_one_rank_is_an_error_on_all_ranks(source, tmp_path) -> None:
    run = run_of(tmp_path / "run", source, "llama3", {"shard": 2})
    run_on_ranks(2, save_with_a_full_disk_on_rank_1, run)
    checkpoint = run.output_dir / "checkpoints" / "step-1"
    file = checkpoint / "rank-00001.safetensors"
    file.write_bytes(b"\0" * file.stat().st_size)
    for error in run_on_ranks(2, load_damaged_checkpoint, run):
        assert "step-1 is damaged: rank-00001.safetensors has other contents" in error


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def read_on_mesh(rank: int, run: Run) -> tuple[dict[str, Tensor], int]:
    """Return the full tensors of this rank's state dict, and the number of elements in its local shards."""
    model = build_parallel(run.model, run.training, Mesh(run.parallel, CPU))
    state = model.state_dict()
    read_pretrained(model.full_model, run.model_from, lambda: state)
    local = sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel() for tensor in state.values())
    return {name: full(tensor) for name, tensor in state.items()}, local


@pytest.mark.parametrize(
    ("family", "degrees"),
    [
        ("llama3", {"tensor": 2}),
        ("gpt_oss", {"pipeline": 2}),
        ("deepseek_v3", {"shard": 2, "expert": 2}),
        pytest.param("llama3", {"shard": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("llama4", {"shard": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("vlm", {"shard": 2}, marks=pytest.mark.slow),
        pytest.param("qwen3_next", {"shard": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
def test_pretrained_weights_on_a_mesh(family, degrees, source, tmp_path) -> None:
    run = dataclasses.replace(run_of(tmp_path / "run", source, family, degrees), model_from=tmp_path / "hf")
    torch.manual_seed(5)
    model = build_model(run.model)
    save_pretrained(model, tmp_path / "hf", max_shard_bytes=100_000)
    expected = model.state_dict()
    size = sum(tensor.numel() for tensor in expected.values())
    read: dict[str, Tensor] = {}
    for state, local in run_on_ranks(world_size(degrees), read_on_mesh, run):
        read |= state
        assert local < 0.8 * size
    assert equal(read, expected)
