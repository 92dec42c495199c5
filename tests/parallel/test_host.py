"""Values exchanged between ranks through the store."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from sightline.parallel.host import HostGroup
from sightline.parallel.torch_private import default_store
from tests.support.processes import run_on_ranks


def exchange(rank: int) -> tuple:
    group = HostGroup()
    gathered = [group.gather((rank, number)) for number in range(3)]
    chosen = [group.broadcast(f"{rank} {number}") for number in range(3)]
    made = group.from_rank_zero(lambda: {"rank": rank})
    group.barrier()
    with pytest.raises(ValueError, match="only rank 0 raised"):
        group.from_rank_zero(lambda: (_ for _ in ()).throw(ValueError("only rank 0 raised")))
    return gathered, chosen, made


def test_ranks_exchange_values() -> None:
    results = run_on_ranks(3, exchange)
    assert results[0][0] == [[(rank, number) for rank in range(3)] for number in range(3)]
    assert results[1][0] == results[2][0] == [[], [], []]
    assert all(chosen == ["0 0", "0 1", "0 2"] for _, chosen, _ in results)
    assert all(made == {"rank": 0} for _, _, made in results)


def use_in_two_threads(rank: int) -> list:
    """Wait in one group while the main thread uses another, first on one rank and then on the other."""
    main, background = HostGroup(), HostGroup(for_thread=True)
    received = []
    thread = threading.Thread(target=lambda: received.append(background.broadcast(rank)))
    if rank == 1:
        thread.start()
    for _ in range(20):
        main.barrier()
    if rank == 0:
        thread.start()
    thread.join()
    return received


def test_a_thread_can_wait_while_the_main_thread_uses_the_store() -> None:
    assert run_on_ranks(2, use_in_two_threads) == [[0], [0]]


def count_keys(rank: int) -> tuple[int, int]:
    group = HostGroup()
    counts = []
    for _ in range(2):
        for _ in range(5):
            group.gather("x" * 100)
            group.broadcast("y" * 100)
        dist.barrier()
        counts.append(default_store().num_keys() if rank == 0 else 0)
        dist.barrier()
    return counts[0], counts[1]


def test_the_store_does_not_grow() -> None:
    first, second = run_on_ranks(2, count_keys)[0]
    assert first == second


def test_one_process_exchanges_with_itself() -> None:
    group = HostGroup()
    assert group.gather(1) == [1]
    assert group.broadcast(2) == 2
    assert group.from_rank_zero(lambda: 3) == 3


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
        return HostGroup().first_of_each_machine(make)
    except ValueError as error:
        return f"error: {error}"


def test_first_of_each_machine_makes_what_the_others_read(tmp_path: Path) -> None:
    (tmp_path / "fails").mkdir()
    made = run_on_ranks(4, make_on_first_of_each_machine, tmp_path, False)
    assert made == ["made", "made by 0", "made", "made by 2"]
    assert run_on_ranks(4, make_on_first_of_each_machine, tmp_path / "fails", True) == ["error: no space"] * 4
