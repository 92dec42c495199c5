"""The native backend in several threads and processes, with other work in between, and without memory."""

import concurrent.futures
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.native import native, needs_native, random_inputs
from tests.support.random_masks import packed

pytestmark = needs_native
ROOT = Path(__file__).parents[2]
MASK = packed(100, 1, 150, 30, padding=5)


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


def results(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs and gradients for one key head, whose blocks are split between the threads."""
    leaves = random_inputs(MASK, (2, 1), dtype=dtype, seed=seed)
    sinks = torch.zeros(2, requires_grad=True)
    out = native(*leaves, MASK, sinks=sinks)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [*leaves, sinks])]


def are_equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeated_runs_are_equal_with_other_work_in_between(dtype: torch.dtype) -> None:
    first = results(0, dtype)
    for size in range(20, 200, 20):
        torch.randn(size, size) @ torch.randn(size, size)
        results(size, dtype)
        assert are_equal(results(0, dtype), first)


def test_calls_from_several_python_threads() -> None:
    """Each has the thread pool for itself or shares it; results stay equal."""

    def work(seed: int) -> list[Tensor]:
        torch.set_num_threads(3)
        return results(seed % 3)

    expected = [results(seed) for seed in range(3)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for seed, found in enumerate(pool.map(work, range(24))):
            assert are_equal(found, expected[seed % 3])


def test_the_number_of_threads_may_change_before_the_backward() -> None:
    leaves = random_inputs(MASK, (2, 1))
    found = []
    for forward, backward in ((1, 1), (3, 1), (1, 3), (3, 3)):
        torch.set_num_threads(forward)
        out = native(*leaves, MASK)
        torch.set_num_threads(backward)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    assert are_equal(found[0], found[1]) and are_equal(found[2], found[3])
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-5)


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=120
    ).stdout


def test_a_forked_process_computes_the_same() -> None:
    """Workers of a DataLoader are forked, and use one thread."""
    code = """
import os, torch
from tests.attention.test_native_threads import are_equal, results
torch.set_num_threads(3)
results(0)
torch.set_num_threads(1)
expected = results(0)
child = os.fork()
if not child:
    torch.set_num_threads(1)
    os._exit(0 if are_equal(results(0), expected) else 1)
print(os.waitpid(child, 0)[1], are_equal(results(0), expected))
"""
    assert run_python(code) == "0 True\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are those of Linux")
def test_without_memory_an_error_is_raised() -> None:
    """Buffers of a thread for 2^20 channels need 2 GB, more than the process may have."""
    code = """
import resource, torch
from tests.support.native import native
from tests.support.random_masks import packed
torch.set_num_threads(1)
leaves = [torch.zeros(1, 1, 2, 2**20, requires_grad=True) for _ in range(3)]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
with torch.no_grad():
    out = native(*leaves, packed(2))
mask, small = packed(2), native(*(x[..., :4] for x in leaves), packed(2)).sum()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, -1))
for call in (lambda: native(*leaves, mask), lambda: native(*(x[..., :4] for x in leaves), mask).sum().backward()):
    try:
        call()
        print("computed")
    except MemoryError as error:
        print(error)
"""
    assert run_python(code) == "native kernel: out of memory\ncomputed\n"
