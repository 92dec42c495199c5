"""Checkpoints of 0.2.0: weights and optimizer state load, and the next step equals that of 0.2.0.

Each archive holds `step-2` of a small model and expected.json: the loss and gradient norm that 0.2.0 computed on the
batch below, and the sum of the absolute values of all weights after one more step.
"""

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from sightline import Batch
from sightline.config import OptimizerConfig
from sightline.parallel.parallel_model import single_process_model
from sightline.training.checkpoint import check_checkpoint, read_tensors, tensors
from sightline.training.export import export_checkpoint
from sightline.training.loading import load
from sightline.training.manifest import Damaged
from sightline.training.optimizer import build_optimizer
from sightline.training.step import train_step

FIXTURES = sorted((Path(__file__).parent.parent / "fixtures" / "checkpoints").glob("*.tar.xz"))
CPU = torch.device("cpu")


def fixed_batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    documents = [torch.randint(2, 260, (length,), generator=generator).tolist() for length in (5, 1, 30, 17, 40)]
    return Batch.from_documents(documents, length=64)


@pytest.mark.parametrize("archive", FIXTURES, ids=lambda path: path.name.split(".")[0])
def test_a_checkpoint_of_0_2_0_continues(archive: Path, tmp_path: Path) -> None:
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    directory = tmp_path / archive.name.split(".")[0]
    expected = json.loads((directory / "expected.json").read_text())
    model = load(directory / "step-2", device=CPU).model.train()
    optimizer = build_optimizer(model, OptimizerConfig(learning_rate=1e-2))
    read_tensors(directory / "step-2", tensors(model, optimizer, CPU))
    result = train_step(
        single_process_model(model), optimizer, fixed_batch(), None, micro_batch_size=1, max_grad_norm=1.0
    )
    assert result.loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    assert result.grad_norm.item() == pytest.approx(expected["grad_norm"], rel=1e-5)
    weights = sum(p.detach().double().abs().sum().item() for p in model.parameters())
    assert weights == pytest.approx(expected["weights"], rel=1e-7)


class Code:
    """Unpickled, it runs code and then returns the index, as if nothing had happened."""

    def __init__(self, index: Any, path: Path) -> None:
        self.index, self.path = index, path

    def __reduce__(self) -> tuple[Any, ...]:
        code = f"(open({str(self.path)!r}, 'w').close(), __import__('pickle').loads({pickle.dumps(self.index)!r}))[1]"
        return eval, (code,)


def with_bytes(index: Any, checkpoint: Path, mark: Path) -> Any:
    """Declare the random number state to be bytes, which torch loads without `weights_only`."""
    buffer = io.BytesIO()
    torch.save(Code(torch.zeros(1), mark), buffer)
    file = checkpoint / "__0_0.distcp"
    stored = next(value for key, value in index.storage_data.items() if key.fqn == "random.cpu")
    start = file.stat().st_size
    file.write_bytes(file.read_bytes() + buffer.getvalue())
    index.state_dict_metadata["random.cpu"] = BytesStorageMetadata()
    index.storage_data = {key: value for key, value in index.storage_data.items() if key.fqn != "random.cpu"}
    index.storage_data[MetadataIndex("random.cpu")] = type(stored)(file.name, start, len(buffer.getvalue()))
    return index


def with_path(path: str) -> Callable[[Any, Path, Path], Any]:
    def change(index: Any, checkpoint: Path, mark: Path) -> Any:
        for key, stored in list(index.storage_data.items()):
            index.storage_data[key] = type(stored)(path, stored.offset, stored.length)
        return index

    return change


def with_transform(index: Any, checkpoint: Path, mark: Path) -> Any:
    for key, stored in list(index.storage_data.items()):
        index.storage_data[key] = type(stored)(stored.relative_path, stored.offset, stored.length, ["zstd"])
    return index


HOSTILE: dict[str, Callable[[Any, Path, Path], Any]] = {
    "code in the index": lambda index, checkpoint, mark: Code(index, mark),
    "code in a field": lambda index, checkpoint, mark: setattr(index, "planner_data", Code({}, mark)) or index,
    "bytes storage": with_bytes,
    "another directory": with_path("../elsewhere/__0_0.distcp"),
    "an absolute path": with_path("/etc/passwd"),
    "a transform": with_transform,
    "not an index": lambda index, checkpoint, mark: {"state_dict_metadata": {}},
    "a function": lambda index, checkpoint, mark: print,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_code_runs_from_an_index_of_0_2_0(kind: str, tmp_path: Path) -> None:
    with tarfile.open(next(path for path in FIXTURES if path.name.startswith("llama3."))) as file:
        file.extractall(tmp_path, filter="data")
    checkpoint, mark = tmp_path / "llama3" / "step-2", tmp_path / "mark"
    shutil.copytree(checkpoint, tmp_path / "llama3" / "elsewhere")
    index = pickle.loads((checkpoint / ".metadata").read_bytes())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(HOSTILE[kind](index, checkpoint, mark)))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    sizes = {name: (checkpoint / name).stat().st_size for name in manifest["files"]}
    (checkpoint / "manifest.json").write_text(json.dumps({"files": sizes}))
    state = {"random": {"cpu": torch.get_rng_state()}}
    for read in (check_checkpoint, load, lambda path: export_checkpoint(path, tmp_path / "hf")):
        with pytest.raises(Damaged, match=r"\.metadata is not an index of tensors"):
            read(checkpoint)
    with pytest.raises(Damaged):
        read_tensors(checkpoint, state)
    assert not mark.exists()
    if kind not in ("not an index", "a function"):  # the file is what it says: reading it as torch does runs the code
        pickle.loads((checkpoint / ".metadata").read_bytes())
        assert mark.exists() == kind.startswith("code")
