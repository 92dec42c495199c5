"""Valid and invalid degrees, and the rank layout."""

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


def timeouts(rank: int, degrees: dict[str, int]) -> set[float]:
    mesh = Mesh(ParallelConfig(**degrees, timeout=7), torch.device("cpu"))
    groups = [mesh.group(axis) for axis in ("pipeline", "replicate", "shard", "context", "tensor", "data", "loss")]
    return {group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups}


def test_collectives_of_every_axis_have_the_timeout_of_the_run() -> None:
    assert run_on_ranks(4, timeouts, {"shard": 2, "tensor": 2})[1] == {7.0}
