"""Valid and invalid degrees, and the rank layout."""

import os
import time
from pathlib import Path

import pytest
import torch

from sightline.config import ParallelConfig
from sightline.parallel.mesh import Mesh, resolve
from tests.support.processes import run_on_ranks


def test_default_shard_degree_uses_all_remaining_ranks() -> None:
    assert resolve(ParallelConfig(), 1).shard == 1
    assert resolve(ParallelConfig(tensor=2), 8).shard == 4
    assert resolve(ParallelConfig(replicate=2, context=2, pipeline=2), 8).shard == 1


@pytest.mark.parametrize(
    ("degrees", "world", "words"),
    [
        (
            {"tensor": 3},
            4,
            "tensor 3 is 3, which does not divide the 4 processes started; use one of: tensor 1 or",
        ),
        ({"tensor": 2, "shard": 4}, 4, "needs 8 processes, but 4 were started; use shard 2, or torchrun --nproc"),
        ({"pipeline": 2, "tensor": 4}, 4, "use one of: pipeline 1; tensor 1 or 2, or start a multiple of 8"),
        ({"shard": 4, "expert": 3}, 4, "parallel.expert 3 does not divide shard 4 x context 1 = 4.* do: .1, 2, 4"),
    ],
)
def test_errors_name_valid_degrees(degrees: dict[str, int], world: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resolve(ParallelConfig(**degrees), world)


def index_and_size(rank: int, degrees: dict[str, int]) -> dict[str, tuple[int, int]]:
    mesh = Mesh(ParallelConfig(**degrees), torch.device("cpu"))
    axes = (
        "pipeline",
        "replicate",
        "shard",
        "context",
        "tensor",
        "data",
        "weights",
        "loss",
        "expert",
        "expert_weights",
    )
    summed = mesh.all_reduce(torch.tensor(rank), "loss")
    return {axis: (mesh.index(axis), mesh.size(axis)) for axis in axes} | {"sum": (int(summed), mesh.size("loss"))}


def test_indices_and_sizes_on_four_ranks() -> None:
    ranks = run_on_ranks(4, index_and_size, {"shard": 2, "context": 2, "expert": 2})
    assert [p["shard"] for p in ranks] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [p["context"] for p in ranks] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [p["weights"] for p in ranks] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [p["data"] for p in ranks] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [p["expert"] for p in ranks] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [p["expert_weights"] for p in ranks] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [p["sum"] for p in ranks] == [(6, 4)] * 4


def test_pipeline_is_outermost() -> None:
    ranks = run_on_ranks(4, index_and_size, {"pipeline": 2, "tensor": 2})
    assert [p["pipeline"][0] for p in ranks] == [0, 0, 1, 1]
    assert [p["tensor"][0] for p in ranks] == [0, 1, 0, 1]


def layout(rank: int, degrees: dict[str, int]) -> dict[str, str]:
    return Mesh(ParallelConfig(**degrees), torch.device("cpu")).describe_layout()


def test_describe_layout_lists_every_rank() -> None:
    assert run_on_ranks(4, layout, {"shard": 2, "pipeline": 2})[0] == {
        "mesh": "pipeline 2 x shard 2",
        "stage 0": "0 | 1",
        "stage 1": "2 | 3",
    }
    assert run_on_ranks(4, layout, {"context": 2, "tensor": 2})[3] == {
        "mesh": "context 2 x tensor 2",
        "ranks": "0+1 2+3",
    }


def make_on_first_of_each_machine(rank: int, directory: Path, fails: bool) -> str:
    """Make a file on the first of each two ranks, and read it on both."""
    os.environ["LOCAL_RANK"] = str(rank % 2)
    file = directory / str(rank // 2)

    def make() -> str:
        if rank % 2:
            return file.read_text()
        time.sleep(0.2 * rank)
        assert not file.exists(), "made twice"
        if fails and rank == 2:
            raise ValueError("no space")
        file.write_text(f"made by {rank}")
        return "made"

    try:
        return Mesh(ParallelConfig(), torch.device("cpu")).first_of_each_machine(make)
    except ValueError as error:
        return f"error: {error}"


def test_first_of_each_machine_makes_what_the_others_read(tmp_path: Path) -> None:
    (tmp_path / "fails").mkdir()
    made = run_on_ranks(4, make_on_first_of_each_machine, tmp_path, False)
    assert made == ["made", "made by 0", "made", "made by 2"]
    assert run_on_ranks(4, make_on_first_of_each_machine, tmp_path / "fails", True) == ["error: no space"] * 4


def make_on_rank_zero(rank: int, fails: bool) -> str:
    def make() -> str:
        assert rank == 0, "called on another rank"
        if fails:
            raise ValueError("no such file")
        return "made"

    try:
        return Mesh(ParallelConfig(), torch.device("cpu")).from_rank_zero(make)
    except ValueError as error:
        return f"error: {error}"


def test_from_rank_zero_returns_the_result_or_raises_the_error_on_every_rank() -> None:
    assert run_on_ranks(2, make_on_rank_zero, False) == ["made", "made"]
    assert run_on_ranks(2, make_on_rank_zero, True) == ["error: no such file"] * 2
