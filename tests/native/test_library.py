"""Loading of the native library: what is missing or stale is reported with its remedy; threads are PyTorch's."""

import ctypes
import itertools
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sightline.native import describe, library, why_missing
from sightline.native.torch_private import find_thread_pool
from tests.support.native import assert_equals_dense, needs_native, random_inputs
from tests.support.random_masks import packed

ROOT = Path(__file__).parents[2]
TASK = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
PARALLEL_FOR = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, TASK, ctypes.c_void_p)
NUM_THREADS = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.POINTER(ctypes.c_uint32))


@pytest.fixture
def reloaded(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let each call look for the library again."""
    monkeypatch.setattr(library, "_load", library._load.__wrapped__)
    return monkeypatch


def test_without_the_file_the_reason_names_a_remedy(reloaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    reloaded.setenv("SIGHTLINE_NATIVE_LIBRARY", str(tmp_path / "none.so"))
    reloaded.setattr(library.shutil, "which", lambda name: f"/bin/{name}" if name == "g++" else None)
    assert why_missing() == f"{tmp_path}/none.so does not exist; run `make setup`, or install again with g++"
    reloaded.setattr(library.shutil, "which", lambda name: None)
    assert why_missing() == "no C++ compiler was found; install g++ or clang++, and run `make setup` again"
    assert describe().startswith("native CPU kernel: not built, attention on a CPU uses the tiled backend: no C++")
    with pytest.raises(library.Missing, match="no C\\+\\+ compiler"):
        library.get_library()


def test_a_file_that_is_no_library_is_reported(reloaded: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("text")
    reloaded.setenv("SIGHTLINE_NATIVE_LIBRARY", str(tmp_path / "text.so"))
    assert "text.so cannot be loaded" in str(why_missing()) and "run `make setup`" in str(why_missing())


@needs_native
def test_a_stale_library_is_refused(reloaded: pytest.MonkeyPatch) -> None:
    reloaded.setattr(library, "ARGUMENTS", struct.Struct("9q2d42q"))
    assert "was built from other sources; run `make setup` to build it again" in str(why_missing())


@needs_native
def test_the_command_reports_the_instruction_sets() -> None:
    for name in library.supported_instruction_sets():
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SIGHTLINE_NATIVE_ISA": name}
        done = subprocess.run(
            [sys.executable, "-m", "sightline.native"], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith(f"native CPU kernel: built, uses {name} (also compiled: ")
        assert "not run on this machine: " in done.stdout


@needs_native
@pytest.mark.parametrize("name", ["avx1024", "AVX2", "none"])
def test_an_instruction_set_that_the_processor_lacks_is_refused(reloaded: pytest.MonkeyPatch, name: str) -> None:
    used = library.instruction_set()
    reloaded.setenv("SIGHTLINE_NATIVE_ISA", name)
    with pytest.raises(ValueError, match=f"cannot use the instruction set '{name}'.*expected one of: .*baseline"):
        why_missing()
    reloaded.delenv("SIGHTLINE_NATIVE_ISA")
    assert library.instruction_set() == used


def test_the_thread_pool_is_that_of_torch() -> None:
    pool, threads, before = find_thread_pool(), ctypes.c_uint32(), torch.get_num_threads()
    assert pool is not None
    num_threads = NUM_THREADS(pool[1].value)
    try:
        for number in (2, 1):
            torch.set_num_threads(number)
            assert num_threads(ctypes.byref(threads)) == 0 and threads.value == number
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def native_library() -> Iterator[ctypes.CDLL]:
    yield library.get_library()
    library.get_library().sightline_native_init(*(find_thread_pool() or (None, None)))


@needs_native
def test_results_do_not_depend_on_how_the_pool_splits_the_work(native_library: ctypes.CDLL) -> None:
    """Parts run in reverse order; a pool that fails is replaced by the calling thread."""
    parts: list[tuple[int, int]] = []

    def split(begin: int, end: int, grain: int, task: TASK, context: int) -> int:
        edges = [begin + (end - begin) * i // 3 for i in range(4)]
        for first, last in reversed(list(itertools.pairwise(edges))):
            if last > first:
                parts.append((first, last))
                task(first, last, context)
        return 0

    def three(threads: "ctypes._Pointer[ctypes.c_uint32]") -> int:
        threads[0] = 3
        return 0

    mask = packed(70, 1, 150)
    leaves = random_inputs(mask)
    sinks = torch.linspace(-1, 1, 4).requires_grad_()
    alone = assert_equals_dense(mask, leaves, sinks)
    pools = {
        "three parts": (PARALLEL_FOR(split), NUM_THREADS(three)),
        "failing": (PARALLEL_FOR(lambda *_: 1), NUM_THREADS(lambda _: 1)),
        "none": None,
    }
    for pool in pools.values():
        pointers = (None, None) if pool is None else tuple(ctypes.cast(function, ctypes.c_void_p) for function in pool)
        native_library.sightline_native_init(*pointers)
        for one, other in zip(alone, assert_equals_dense(mask, leaves, sinks), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert len(parts) > 3
