"""The native kernel of RMSNorm against float64 and against PyTorch's function, with gradients."""

import ctypes
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from sightline.layers import RMSNorm, ZeroCenteredRMSNorm, norm
from sightline.native.library import get_library, instruction_set, select_instruction_set, supported_instruction_sets
from sightline.native.norm import rms_norm_backward, rms_norm_forward
from tests.support.native import needs_native

pytestmark = needs_native
EPS = 1e-5
NAMES = supported_instruction_sets() if norm.why_missing() is None else []


@pytest.fixture(params=NAMES)
def each_instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    used = instruction_set()
    select_instruction_set(request.param)
    yield
    select_instruction_set(used)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Use the kernel for tensors of any size; return the list of the shapes that it receives."""
    shapes: list[torch.Size] = []

    def record(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        shapes.append(x.shape)
        return torch.ops.sightline.rms_norm(x, weight, eps)

    monkeypatch.setattr(norm, "MIN_SIZE", 0)
    monkeypatch.setattr(norm, "NORM", record)
    return shapes


def random_inputs(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, weight and the gradient of the output."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, d_out = (torch.randn(shape, generator=generator) for _ in range(2))
    return x, torch.rand(shape[-1], generator=generator) + 0.5, d_out


def results(function: Callable[..., Tensor], x: Tensor, weight: Tensor, d_out: Tensor) -> list[Tensor]:
    """Return the output and the gradients of x and weight."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    out = function(x, weight, EPS)
    return [out.detach(), *torch.autograd.grad(out, (x, weight), d_out)]


def plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.ops.sightline.rms_norm(x, weight, eps)[0]


def assert_equals_float64(x: Tensor, weight: Tensor, d_out: Tensor) -> None:
    exact = results(plain, x.double(), weight.double(), d_out.double())
    for found, expected in zip(results(native, x, weight, d_out), exact, strict=True):
        assert found.dtype == torch.float32 and found.shape == expected.shape
        error = (found - expected).abs() / (1 + expected.abs())
        assert error.max() < 5e-6


@pytest.mark.parametrize("size", [1, 3, 17, 32, 100, 4096])
@pytest.mark.parametrize("rows", [1, 50])
def test_equals_float64(each_instruction_set: None, rows: int, size: int) -> None:
    assert_equals_float64(*random_inputs(rows, size))


def test_many_rows_and_dimensions(each_instruction_set: None) -> None:
    assert_equals_float64(*random_inputs(1, 700, 4, 32))  # heads, more rows than blocks
    assert_equals_float64(*random_inputs(24))


def test_strides(each_instruction_set: None) -> None:
    x, weight, d_out = random_inputs(2, 40, 24)
    part = torch.randn(2, 40, 50)[..., 3:27]  # of a wider product, as the latents of MLA
    assert_equals_float64(part, weight, d_out)
    assert_equals_float64(x.expand(2, 40, 24)[:1].expand(2, 40, 24), weight, d_out)
    assert_equals_float64(torch.randn(24, 40, 2).permute(2, 1, 0), weight, d_out.permute(1, 0, 2).reshape(2, 40, 24))
    assert_equals_float64(x, weight, torch.ones(()).expand(2, 40, 24))
    assert_equals_float64(x[:, ::3], torch.rand(48)[::2], d_out[:, ::3])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 33)])
def test_no_rows(each_instruction_set: None, shape: tuple[int, ...]) -> None:
    out, d_x, d_weight = results(native, torch.empty(shape), torch.ones(shape[-1]), torch.empty(shape))
    assert out.shape == d_x.shape == shape and torch.equal(d_weight, torch.zeros(shape[-1]))


@pytest.mark.parametrize("shape", [(3000, 32), (513, 257), (7, 40000)])
def test_results_do_not_depend_on_the_number_of_threads(shape: tuple[int, int]) -> None:
    inputs, threads = random_inputs(*shape), torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(results(native, *inputs))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 0.0])
@pytest.mark.parametrize("size", [5, 37])
def test_values_that_are_not_finite_propagate(each_instruction_set: None, size: int, value: float) -> None:
    """NaN and infinity appear where PyTorch's function has them; an overflow of the square too."""
    for target in range(3):
        inputs = random_inputs(4, size)
        inputs[target].view(-1)[2] = value
        if value == 0.0:
            inputs[target][:] = 0.0
        for found, expected in zip(results(native, *inputs), results(plain, *inputs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kind", [RMSNorm, ZeroCenteredRMSNorm])
@pytest.mark.parametrize("shape", [(2, 30, 64), (2, 10, 3, 16)])
def test_layers_use_it(calls: list[torch.Size], kind: type[RMSNorm], shape: tuple[int, ...]) -> None:
    layer = kind(shape[-1], EPS)
    x, weight, d_out = random_inputs(*shape)
    with torch.no_grad():
        layer.weight.copy_(weight)
    scale = 1 + layer.weight if kind is ZeroCenteredRMSNorm else layer.weight
    x.requires_grad_()
    found = [layer(x), *torch.autograd.grad(layer(x), (x, layer.weight), d_out)]
    assert calls == [shape] * 2
    expected = [plain(x, scale, EPS), *torch.autograd.grad(plain(x, scale, EPS), (x, layer.weight), d_out)]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_layer_uses_pytorch_elsewhere(calls: list[torch.Size], monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision, autocast, float64, tensors of other types, the meta device; and small tensors."""

    class Subclass(Tensor):
        pass

    layer, (x, weight, _) = RMSNorm(16, EPS), random_inputs(9, 16)
    layer.init_weights()
    others = [(x.to(kind), weight.to(kind)) for kind in (torch.bfloat16, torch.float64, "meta")]
    for one, other in [*others, (x.as_subclass(Subclass), weight)]:
        assert norm.rms_norm(one, other, EPS).dtype == one.dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    monkeypatch.setattr(norm, "MIN_SIZE", x.numel() + 1)
    assert torch.equal(layer(x), plain(x, layer.weight, EPS))
    monkeypatch.setattr(norm, "MIN_SIZE", 0)
    monkeypatch.setattr(norm, "why_missing", lambda: "not built")
    assert torch.equal(layer(x), plain(x, layer.weight, EPS))
    assert calls == []


def test_forward_mode_derivatives_are_those_of_pytorch(calls: list[torch.Size]) -> None:
    x, weight, tangent = random_inputs(5, 16)
    with forward_ad.dual_level():
        pairs = [f(forward_ad.make_dual(x, tangent), weight, EPS) for f in (norm.rms_norm, plain)]
        found, expected = (forward_ad.unpack_dual(pair).tangent for pair in pairs)
    torch.testing.assert_close(found, expected)
    assert calls == []


@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_second_derivatives(frozen: int | None) -> None:
    x, weight, d_out = random_inputs(6, 10)
    found = []
    for function in (native, plain):
        leaves = [x.clone(), weight.clone(), d_out.clone()]
        wanted = [leaf.requires_grad_() for i, leaf in enumerate(leaves) if i != frozen]
        first = torch.autograd.grad(function(leaves[0], leaves[1], EPS), wanted[:-1], leaves[2], create_graph=True)
        total = torch.stack([(gradient**3).sum() for gradient in first]).sum()
        found.append([*first, *torch.autograd.grad(total, wanted, materialize_grads=True)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_the_operators_are_registered_rightly() -> None:
    x, weight, d_out = random_inputs(2, 3, 8)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(norm.NORM, (x.requires_grad_(), nn.Parameter(weight), EPS), test_utils=checks)
    arguments = (d_out, x.detach(), weight, torch.ones(6))
    torch.library.opcheck(norm.NORM_BACKWARD, arguments, test_utils=checks)


def test_arguments_that_do_not_fit_are_refused() -> None:
    x, weight, d_out = random_inputs(4, 8)
    with pytest.raises(ValueError, match=r"expected x \[..., W\] and weight \[W\], W > 0, got \(4, 8\) and \(7,\)"):
        rms_norm_forward(x, weight[:7], EPS)
    with pytest.raises(ValueError, match=r"W > 0, got \(4, 0\) and \(0,\)"):
        rms_norm_forward(x[:, :0], weight[:0], EPS)
    with pytest.raises(ValueError, match="expected weight float32 on the CPU, got torch"):
        rms_norm_forward(x, weight.double(), EPS)
    for arguments in ((d_out[:3], x, weight, torch.ones(4)), (d_out, x, weight, torch.ones(3)),
                      (d_out, x, weight[:7], torch.ones(4))):  # fmt: skip
        with pytest.raises(ValueError, match="one rstd per row, got"):
            rms_norm_backward(*arguments)


@pytest.mark.parametrize("rows, size", [(-1, 4), (1, 0), (1, -4), (1, 2**31), (2**60, 2**30)])
def test_wrong_sizes_and_missing_pointers_give_an_error_code(rows: int, size: int) -> None:
    library, memory = get_library(), (ctypes.c_float * 4096)()
    pointer = ctypes.addressof(memory)
    assert library.sightline_rms_norm_forward(pointer, 4, pointer, rows, size, EPS, pointer, pointer) == 1
    backward = [pointer, pointer, 4, pointer, pointer, rows, size, pointer, pointer, pointer]
    assert library.sightline_rms_norm_backward(*backward) == 1
    assert library.sightline_rms_norm_forward(None, 4, pointer, 1, 4, EPS, pointer, pointer) == 1
    for index in (0, 1, 3, 4, 7, 8, 9):
        missing = [pointer, pointer, 4, pointer, pointer, 1, 4, pointer, pointer, pointer]
        missing[index] = None
        assert library.sightline_rms_norm_backward(*missing) == 1
