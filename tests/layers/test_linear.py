"""`linear` and the grouped products without gradients, against F.linear and the products with gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from sightline.layers import Linear
from sightline.layers import grouped as grouped_module
from sightline.layers import linear as module
from sightline.layers.grouped import grouped_linear
from tests.support.native import needs_native


def spied(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the list of inputs that reach oneDNN."""
    calls: list[Tensor] = []
    compute = module.onednn_linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(x)
        return compute(x, weight, bias)

    monkeypatch.setattr(module, "onednn_linear", spy)
    return calls


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 64])
def test_equals_f_linear_without_gradients(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layouts of the tokens and the weight are tried. The weight is so small that oneDNN takes 64 rows only."""
    torch.manual_seed(0)
    calls = spied(monkeypatch)
    layer, x = Linear(96, 33, bias=bias), torch.randn(rows, 1, 96)
    inputs = [x, x[:, 0], x.transpose(0, 1), torch.randn(rows, 1, 192)[..., 96:], torch.randn(rows, 96, 2)[..., 0]]
    expected = [F.linear(x, layer.weight, layer.bias) for x in inputs]
    weight = torch.randn(2, 33, 4, 96)[1, :, 2]  # strided
    with torch.no_grad():
        for x, want in zip(inputs, expected, strict=True):
            out = layer(x)
            assert out.shape == want.shape and out.is_contiguous()
            torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(module.linear(inputs[0], weight), F.linear(inputs[0], weight), atol=1e-4, rtol=1e-5)
    assert len(calls) == (6 if rows == 64 and module.HAS_ONEDNN_LINEAR else 0)


@pytest.fixture
def native_calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs that reach the native kernel, which takes weights of every size."""
    calls: list[Tensor] = []
    compute = module.few_tokens_linear

    def spy(x: Tensor, *arguments: Tensor | None) -> Tensor:
        calls.append(x)
        return compute(x, *arguments)

    monkeypatch.setattr(module, "NATIVE_SIZE", 1)
    for one in (module, grouped_module):
        monkeypatch.setattr(one, "few_tokens_linear", spy)
    return calls


@needs_native
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 4, 5, 16, 17])
def test_few_tokens_use_the_native_kernel(rows: int, bias: bool, native_calls: list[Tensor]) -> None:
    torch.manual_seed(0)
    layer, x = Linear(40, 33, bias=bias), torch.randn(rows, 1, 40)
    inputs = [x, x[:, 0], x.transpose(0, 1), torch.randn(rows, 1, 80)[..., 40:], torch.randn(rows, 40, 2)[..., 0]]
    with torch.no_grad():
        for one in inputs:
            out = layer(one)
            assert out.is_contiguous()
            torch.testing.assert_close(out, F.linear(one, layer.weight, layer.bias), atol=1e-5, rtol=1e-5)
    assert len(native_calls) == (len(inputs) if 1 <= rows <= 16 else 0)
    layer(x).sum().backward()
    assert len(native_calls) == (len(inputs) if 1 <= rows <= 16 else 0), "gradients are computed by PyTorch"


@needs_native
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_must_be_an_operator_is_one(native_calls: list[Tensor]) -> None:
    """A trace, a mode, forward-mode derivatives, torch.func and batched gradients must find an operator of PyTorch."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, 40), torch.randn(33, 40)
    expected = F.linear(x, weight)

    def tangent() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(module.linear(forward_ad.make_dual(x, x), weight)).tangent

    def flops() -> Tensor:
        with FlopCounterMode(display=False) as counter:
            out = module.linear(x, weight)
        assert counter.get_total_flops() == 2 * 3 * 33 * 40
        return out

    ways: dict[str, Callable[[], Tensor]] = {
        "forward mode": tangent,
        "mode": flops,
        "vmap": lambda: torch.func.vmap(lambda x: module.linear(x[None], weight)[0])(x),
        "trace": lambda: torch.jit.trace(lambda x: module.linear(x, weight), torch.randn(3, 40), check_trace=False)(x),
        "transposed weight": lambda: module.linear(x, weight.t().contiguous().t()),
    }
    with torch.no_grad():
        for name, way in ways.items():
            torch.testing.assert_close(way(), expected, atol=1e-4, rtol=1e-4, msg=name)
    assert not native_calls


@needs_native
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("counts", [[1, 0, 16], [0, 17, 2], [0, 0, 0]])
def test_groups_of_few_tokens_use_the_native_kernel(counts: list[int], bias: bool, native_calls: list[Tensor]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(sum(counts) + 3, 24), torch.randn(3, 20, 24)
    b = torch.randn(3, 20) if bias else None
    expected = grouped_linear(x, weight, torch.tensor(counts), b)  # with gradients: by PyTorch
    with torch.no_grad():
        out = grouped_linear(x, weight, torch.tensor(counts), b)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert out[sum(counts) :].eq(0).all()
    assert any(len(call) == len(x) for call in native_calls) == (max(counts) <= 16)


def test_other_dtypes_and_autocast_use_f_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied(monkeypatch)
    layer, x = Linear(512, 512), torch.randn(64, 512)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert layer.double()(x.double()).dtype == torch.float64
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert layer.float()(x).dtype == torch.bfloat16
    assert not calls


@pytest.mark.skipif(not module.HAS_ONEDNN_LINEAR, reason="PyTorch was built without oneDNN, or for another processor")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("size", "channels"), [(48, 33), (33, 48), (16, 16)])
@pytest.mark.parametrize("shape", [(0,), (1,), (7, 3), (2, 5, 4)])
def test_gradients_equal_those_of_f_linear(
    shape: tuple[int, ...], size: int, channels: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First and second derivatives; strided inputs and cotangents; a frozen weight or input gets no gradient."""
    torch.manual_seed(0)
    calls = spied(monkeypatch)
    monkeypatch.setattr(module, "ONEDNN_SIZE", 1)
    layer, x = Linear(size, channels, bias=bias), torch.randn(*shape, 2 * size)[..., ::2].requires_grad_()
    cotangent = torch.randn(*shape, 2 * channels)[..., ::2].requires_grad_()
    leaves = [x, *layer.parameters()]

    def derivatives(out: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(out, leaves, cotangent, create_graph=True)
        return [out, *first, *torch.autograd.grad(sum(f.square().sum() for f in first), [*leaves[:2], cotangent])]

    actual, expected = derivatives(layer(x)), derivatives(F.linear(x, layer.weight, layer.bias))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-5)
    assert not calls if shape == (0,) else len(calls) > 3
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    layer(x.detach()).sum().backward() if bias else None
    assert layer.weight.grad is None and x.grad is not None


def test_transforms_equal_those_of_f_linear() -> None:
    """Transforms of torch.func and forward-mode derivatives of a product that is large enough for oneDNN."""
    torch.manual_seed(0)
    layer, x = Linear(256, 32), torch.randn(64, 256)
    transforms: dict[str, Callable[[Callable[[Tensor], Tensor]], Tensor]] = {
        "grad": lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        "jvp": lambda f: torch.func.jvp(f, (x,), (x,))[1],
        "vmap": lambda f: torch.func.vmap(f)(x.view(2, 32, 256)),
    }
    for name, transform in transforms.items():
        expected = transform(lambda x: F.linear(x, layer.weight, layer.bias))
        torch.testing.assert_close(transform(layer), expected, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("counts", [[2, 0, 3, 0], [0, 0, 0, 0], [0, 0, 0, 5], [1, 1, 1, 1]])
@pytest.mark.parametrize("bias", [False, True])
def test_grouped_products_without_gradients(counts: list[int], bias: bool) -> None:
    """Groups without rows are skipped; the rows after the last group give 0."""
    torch.manual_seed(0)
    x, weight = torch.randn(6, 8), torch.randn(4, 5, 8)
    biases = torch.randn(4, 5) if bias else None
    expected = grouped_linear(x, weight.requires_grad_(), torch.tensor(counts), biases)
    with torch.no_grad():
        actual = grouped_linear(x, weight, torch.tensor(counts), biases)
    torch.testing.assert_close(actual, expected.detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(actual[sum(counts) :], torch.zeros(6 - sum(counts), 5))
