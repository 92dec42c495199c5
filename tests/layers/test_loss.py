import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sightline.layers import linear_cross_entropy, loss

N, W, V = 23, 16, 41


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(N, W, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, W, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, V, (N,))
    labels[torch.tensor([0, 5, 6, 7, 22])] = -100
    return hidden, weight, labels


def reference_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), labels, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk_size", [1, 3, 6, 17, 18, 19, 512])  # 18 tokens have a label
def test_equals_cross_entropy_at_every_chunk_boundary(chunk_size: int) -> None:
    hidden, weight, labels = make_inputs()
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size)
    grads = torch.autograd.grad(loss * 0.37, (hidden, weight))
    expected = reference_loss(hidden, weight, labels)
    expected_grads = torch.autograd.grad(expected * 0.37, (hidden, weight))
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-5)


def test_gradcheck_in_float64() -> None:
    hidden, weight, labels = make_inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, 7), (hidden, weight))
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, 7), reference_loss(hidden, weight, labels))


def test_unlabeled_tokens_are_not_computed() -> None:
    hidden, weight, labels = make_inputs()
    with torch.no_grad():
        hidden[labels == -100] = float("nan")
    loss = linear_cross_entropy(hidden, weight, labels, 4)
    loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all()
    assert torch.equal(hidden.grad[labels == -100], torch.zeros(5, W))
    assert (hidden.grad[labels != -100] != 0).any(dim=1).all()


def test_no_labels_give_zero_loss_and_gradients() -> None:
    hidden, weight, _ = make_inputs()
    loss = linear_cross_entropy(hidden, weight, torch.full((N,), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(hidden.grad, torch.zeros(N, W)) and torch.equal(weight.grad, torch.zeros(V, W))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_input_gets_no_gradient(frozen: str) -> None:
    hidden, weight, labels = make_inputs()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    free = weight if frozen == "hidden" else hidden
    linear_cross_entropy(hidden, weight, labels, 5).backward()
    (expected,) = torch.autograd.grad(reference_loss(hidden, weight, labels), free)
    torch.testing.assert_close(free.grad, expected, atol=1e-5, rtol=1e-5)


def test_backward_twice_gives_the_same_gradients() -> None:
    hidden, weight, labels = make_inputs()
    loss = linear_cross_entropy(hidden, weight, labels, 5)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest new tensor, ignoring views and in-place results."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and func._schema.returns[0].alias_info is None:
            self.elements = max(self.elements, out.numel())
        return out


def test_full_logits_are_never_materialized() -> None:
    hidden, weight, labels = make_inputs()
    with Largest() as largest:
        reference_loss(hidden, weight, labels).backward()
    assert largest.elements == N * V
    with Largest() as largest:
        linear_cross_entropy(hidden, weight, labels, 4).backward()
    assert largest.elements == V * W  # gradient of the weight; logits are at most 4 x 41


def test_no_grad_computes_the_same_value_without_gradients() -> None:
    hidden, weight, labels = make_inputs()
    with torch.no_grad(), Largest() as largest:
        loss = linear_cross_entropy(hidden, weight, labels, 4)
    assert not loss.requires_grad and largest.elements == 4 * V
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, labels, 4).detach())


def test_unlikely_label_has_exact_finite_loss() -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[5000.0], [-5000.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 10_000.0 and hidden.grad.item() == 10_000.0


def test_bfloat16_inputs_have_float32_logits() -> None:
    hidden, weight, labels = make_inputs(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels, 5)
    loss.backward()
    hidden32, weight32 = (x.detach().float().requires_grad_() for x in (hidden, weight))
    expected = reference_loss(hidden32, weight32, labels)
    expected.backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)  # bfloat16 logits would be 1e-3 off
    for grad, expected_grad in ((hidden.grad, hidden32.grad), (weight.grad, weight32.grad)):
        torch.testing.assert_close(grad.float(), expected_grad, atol=2e-2, rtol=2e-2)


def test_autocast_rounds_inputs_but_not_logits() -> None:
    hidden, weight, labels = make_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, 5)
    loss.backward()
    expected = reference_loss(hidden.detach().bfloat16().float(), weight.detach().bfloat16().float(), labels)
    torch.testing.assert_close(loss.detach(), expected, atol=0, rtol=1e-6)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("label", [V, V + 7, -1])
def test_label_outside_the_vocabulary_is_an_error(label: int) -> None:
    hidden, weight, labels = make_inputs()
    labels[3] = label
    with pytest.raises(ValueError, match=f"label {label} is outside the vocabulary of 41 tokens; .*0 to 40"):
        linear_cross_entropy(hidden, weight, labels)


def test_unflattened_rows_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"got \[\(1, 23, 16\), \(41, 16\), \(1, 23\)\]; flatten rows first"):
        linear_cross_entropy(torch.randn(1, N, W), torch.randn(V, W), torch.zeros(1, N, dtype=torch.int64))


def make_token_weights() -> Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(4)) * 2 - 0.5


@pytest.mark.parametrize("chunk_size", [1, 7, 18, 512])
def test_token_weights_scale_each_loss(chunk_size: int) -> None:
    hidden, weight, labels = make_inputs()
    weights = make_token_weights()
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size, token_weights=weights)
    each = F.cross_entropy(hidden @ weight.t(), labels, ignore_index=-100, reduction="none")
    expected = (each * weights).sum()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-6)
    for grad, expected_grad in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-5)


def test_reduction_none_computes_no_gradients() -> None:
    hidden, weight, labels = make_inputs()
    with Largest() as largest:
        each = linear_cross_entropy(hidden, weight, labels, 4, reduction="none")
    assert not each.requires_grad and largest.elements == 4 * V
    expected = F.cross_entropy(hidden @ weight.t(), labels, ignore_index=-100, reduction="none")
    torch.testing.assert_close(each, expected, atol=1e-6, rtol=1e-6)
    assert not each[labels == -100].any()


@pytest.mark.parametrize("weights", [None, make_token_weights()], ids=["plain", "weighted"])
def test_masked_labels_equal_selected_labels(weights: Tensor | None, monkeypatch) -> None:
    def measure() -> list[Tensor]:
        hidden, weight, labels = make_inputs()
        each = linear_cross_entropy(hidden, weight, labels, 5, token_weights=weights, reduction="none")
        value = linear_cross_entropy(hidden, weight, labels, 5, token_weights=weights)
        return [each, value.detach(), *torch.autograd.grad(value, (hidden, weight))]

    expected = measure()
    monkeypatch.setattr(loss, "select_tokens", loss.mask_tokens)
    for found, wanted in zip(measure(), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6 * float(wanted.abs().max()), rtol=0)
    hidden, weight, labels = make_inputs()
    for label in (V, -1):
        labels[3] = label
        assert linear_cross_entropy(hidden, weight, labels).isnan(), "an invalid label on a device must give nan"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_device_synchronization(device: str) -> None:
    """Reading a meta tensor raises. Labels may be on the CPU, where reading them does not synchronize."""
    hidden, weight = (x.detach().to("meta").requires_grad_() for x in make_inputs()[:2])
    labels = make_inputs()[2].to(device)
    linear_cross_entropy(hidden, weight, labels, 5, token_weights=make_token_weights().to(device)).backward()
    assert hidden.grad.shape == (N, W) and weight.grad.shape == (V, W)
    assert linear_cross_entropy(hidden, weight, labels, 5, reduction="none").shape == (N,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_equals_cross_entropy(dtype: torch.dtype) -> None:
    hidden, weight, labels = make_inputs(dtype)
    bias = torch.randn(V, dtype=dtype, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, labels, 7, bias=bias)
    expected = F.cross_entropy(F.linear(hidden.float(), weight.float(), bias.float()), labels, reduction="sum")
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
    leaves = (hidden, weight, bias)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for grad, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert grad.dtype == dtype
        assert (grad - wanted).norm() <= tolerance * wanted.norm()
    each = linear_cross_entropy(hidden, weight, labels, 7, bias=bias, reduction="none")
    torch.testing.assert_close(each.sum(), expected, atol=0, rtol=1e-6)


def test_transformed_logits_equal_cross_entropy() -> None:
    def transform(logits: Tensor) -> Tensor:
        return torch.tanh(logits / 2) * 3

    hidden, weight, labels = make_inputs()
    gradients = loss.transformed(transform)
    result = linear_cross_entropy(hidden, weight, labels, 7, losses_to_grads=gradients)
    expected = F.cross_entropy(transform(hidden @ weight.t()), labels, reduction="sum")
    torch.testing.assert_close(result, expected, atol=0, rtol=1e-6)
    found, wanted = (torch.autograd.grad(value, (hidden, weight)) for value in (result, expected))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
