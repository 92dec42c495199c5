"""The native product of few tokens, against float64; bad arguments raise."""

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sightline.native import few_tokens_linear, library
from tests.support.native import needs_native

pytestmark = needs_native


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    used = library.instruction_set()
    if request.param not in library.supported_instruction_sets():
        pytest.skip(f"this processor lacks {request.param}")
    library.select_instruction_set(request.param)
    yield
    library.select_instruction_set(used)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, counts: list[int]) -> Tensor:
    """Return the product in float64."""
    parts = [
        part.double() @ weight[g].double().t() + (0 if bias is None else bias[g].double())
        for g, part in enumerate(x[: sum(counts)].split(counts))
    ]
    return torch.cat(parts)


SIZES = [(1, 16), (15, 17), (16, 31), (17, 32), (33, 48), (40, 63), (64, 344), (5, 1000)]


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("features", "channels"), SIZES)
def test_equals_float64(features: int, channels: int, bias: bool) -> None:
    """All numbers of tokens of a panel, and rows with strides that a copy would hide."""
    torch.manual_seed(0)
    weight, b = torch.randn(features, channels), torch.randn(features) if bias else None
    strided = torch.randn(features, 2, channels + 3)[:, 1, 2:-1]
    for rows, w in itertools.product((0, 1, 2, 3, 4, 5, 7, 8, 9), (weight, strided)):
        for x in (torch.randn(rows, channels), torch.randn(rows, 2 * channels)[:, 1:-1:2], torch.randn(rows, 1000)):
            x = x[:, -channels:] if x.shape[1] >= channels else torch.randn(rows, channels)
            out = few_tokens_linear(x, w, b)
            assert out.is_contiguous()
            expected = exact(x, w[None], None if b is None else b[None], [rows])
            torch.testing.assert_close(out.double(), expected, atol=5e-5, rtol=1e-5)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counts", [[3], [0, 2, 0], [1, 0, 5, 9, 0, 1], [0, 0]])
def test_groups_equal_float64(counts: list[int], bias: bool) -> None:
    """Groups may be empty; rows after the last group are left alone; the groups of the weight have a stride."""
    torch.manual_seed(0)
    weight = torch.randn(len(counts), 2, 21, 40)[:, 1]
    b = torch.randn(len(counts), 30)[:, 9:] if bias else None
    x = torch.randn(sum(counts) + 2, 40)
    out = few_tokens_linear(x, weight, b, torch.tensor(counts))
    assert out.shape == (len(x), 21)
    torch.testing.assert_close(out[:-2].double(), exact(x, weight, b, counts), atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("instruction_set")
def test_a_row_depends_on_nothing_but_its_token() -> None:
    """Not on the other rows, the number of threads, or its group's number: bit for bit."""
    torch.manual_seed(0)
    x, weight = torch.randn(9, 344), torch.randn(1001, 344)
    whole, threads = few_tokens_linear(x, weight), torch.get_num_threads()
    alone = torch.cat([few_tokens_linear(x[i : i + 1], weight) for i in range(9)])
    grouped = few_tokens_linear(x, weight.expand(3, -1, -1), None, torch.tensor([4, 0, 5]))
    try:
        torch.set_num_threads(2)
        parallel = few_tokens_linear(x, weight)
    finally:
        torch.set_num_threads(threads)
    for other in (alone, grouped, parallel):
        assert torch.equal(whole, other)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("channel", [0, 31, 32, 34])
def test_values_that_are_not_finite_reach_their_outputs_only(channel: int) -> None:
    x, weight = torch.ones(3, 35), torch.ones(20, 35)
    weight[7, channel], x[1, channel] = torch.inf, -torch.inf
    out = few_tokens_linear(x, weight)
    assert out[1].eq(-torch.inf).all() and out[[0, 2], 7].eq(torch.inf).all()
    finite = torch.ones_like(out, dtype=torch.bool)
    finite[1], finite[:, 7] = False, False
    assert out[finite].eq(35).all()


X, W = torch.zeros(2, 16), torch.zeros(3, 5, 16)


@pytest.mark.parametrize(
    "arguments",
    [
        (X[0], W[0]),
        (X, W[0, :, :15]),
        (X[:, :15], W[0, :, :15]),
        (X.double(), W[0].double()),
        (X, W[0].bfloat16()),
        (X, torch.zeros(16, 5).t()),
        (X, W[0], torch.zeros(6)),
        (X, W[0], torch.zeros(5).double()),
        (X, W),
        (X, W[0], None, torch.tensor([2])),
        (X, W, torch.zeros(5), torch.tensor([1, 1, 0])),
        (X, W, None, torch.tensor([1, 1])),
        (X, W, None, torch.tensor([1, 1, 0], dtype=torch.int32)),
        (X, W, None, torch.tensor([1, 1, 1])),
        (X, W, None, torch.tensor([3, -1, 0])),
        (X, W, None, torch.tensor([1, 2**62, 2**62])),
        (X, W[0].to("meta")),
    ],
)
def test_bad_arguments_raise(arguments: tuple[Tensor, ...]) -> None:
    with pytest.raises(ValueError, match="native"):
        few_tokens_linear(*arguments)
