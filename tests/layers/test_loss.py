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


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.t(), labels, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk_size", [1, 3, 6, 17, 18, 19, 512])  # 18 tokens have a label
def test_equals_cross_entropy_at_every_chunk_boundary(chunk_size: int) -> None:
    hidden, weight, labels = make_inputs()
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size)
    grads = torch.autograd.grad(loss * 0.37, (hidden, weight))
    expected = plain(hidden, weight, labels)
    expected_grads = torch.autograd.grad(expected * 0.37, (hidden, weight))
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-5)


def test_gradcheck_in_float64() -> None:
    hidden, weight, labels = make_inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, labels, 7), (hidden, weight))
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, 7), plain(hidden, weight, labels))


def test_tokens_without_a_label_are_not_computed() -> None:
    hidden, weight, labels = make_inputs()
    with torch.no_grad():
        hidden[labels == -100] = float("nan")
    loss = linear_cross_entropy(hidden, weight, labels, 4)
    loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all()
    assert torch.equal(hidden.grad[labels == -100], torch.zeros(5, W))
    assert (hidden.grad[labels != -100] != 0).any(dim=1).all()


def test_no_label_at_all_is_no_loss_and_no_gradient() -> None:
    hidden, weight, _ = make_inputs()
    loss = linear_cross_entropy(hidden, weight, torch.full((N,), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(hidden.grad, torch.zeros(N, W)) and torch.equal(weight.grad, torch.zeros(V, W))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_gets_no_gradient(frozen: str) -> None:
    hidden, weight, labels = make_inputs()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    free = weight if frozen == "hidden" else hidden
    linear_cross_entropy(hidden, weight, labels, 5).backward()
    (expected,) = torch.autograd.grad(plain(hidden, weight, labels), free)
    torch.testing.assert_close(free.grad, expected, atol=1e-5, rtol=1e-5)


def test_backward_twice_gives_the_same_gradients() -> None:
    hidden, weight, labels = make_inputs()
    loss = linear_cross_entropy(hidden, weight, labels, 5)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Largest(TorchDispatchMode):
    """Remembers the most elements of any new tensor; views and in-place results are none."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and func._schema.returns[0].alias_info is None:
            self.elements = max(self.elements, out.numel())
        return out


def test_the_logits_of_all_tokens_never_exist() -> None:
    hidden, weight, labels = make_inputs()
    with Largest() as seen:
        plain(hidden, weight, labels).backward()
    assert seen.elements == N * V
    with Largest() as seen:
        linear_cross_entropy(hidden, weight, labels, 4).backward()
    assert seen.elements == V * W  # the weight's gradient; logits are at most 4 x 41


def test_under_no_grad_the_value_is_the_same_and_no_gradient_is_computed() -> None:
    hidden, weight, labels = make_inputs()
    with torch.no_grad(), Largest() as seen:
        loss = linear_cross_entropy(hidden, weight, labels, 4)
    assert not loss.requires_grad and seen.elements == 4 * V
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, labels, 4).detach())


def test_an_unlikely_label_has_a_finite_exact_loss() -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[5000.0], [-5000.0]])
    loss = linear_cross_entropy(hidden, weight, torch.tensor([1]))
    loss.backward()
    assert loss.item() == 10_000.0 and hidden.grad.item() == 10_000.0


def test_bfloat16_inputs_have_float32_logits() -> None:
    hidden, weight, labels = make_inputs(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels, 5)
    loss.backward()
    wide_hidden, wide_weight = (x.detach().float().requires_grad_() for x in (hidden, weight))
    expected = plain(wide_hidden, wide_weight, labels)
    expected.backward()
    assert loss.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, expected, atol=0, rtol=1e-6)  # bfloat16 logits would be 1e-3 off
    for grad, wide in ((hidden.grad, wide_hidden.grad), (weight.grad, wide_weight.grad)):
        torch.testing.assert_close(grad.float(), wide, atol=2e-2, rtol=2e-2)


def test_autocast_rounds_the_inputs_and_not_the_logits() -> None:
    hidden, weight, labels = make_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, 5)
    loss.backward()
    expected = plain(hidden.detach().bfloat16().float(), weight.detach().bfloat16().float(), labels)
    torch.testing.assert_close(loss.detach(), expected, atol=0, rtol=1e-6)
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("label", [V, V + 7, -1])
def test_a_label_outside_the_vocabulary_is_named(label: int) -> None:
    hidden, weight, labels = make_inputs()
    labels[3] = label
    with pytest.raises(ValueError, match=f"label {label} is outside the vocabulary of 41 tokens; .*0 to 40"):
        linear_cross_entropy(hidden, weight, labels)


def test_rows_that_are_not_flattened_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \[\(1, 23, 16\), \(41, 16\), \(1, 23\)\]; flatten rows first"):
        linear_cross_entropy(torch.randn(1, N, W), torch.randn(V, W), torch.zeros(1, N, dtype=torch.int64))


def weights_of_tokens() -> Tensor:
    return torch.rand(N, generator=torch.Generator().manual_seed(4)) * 2 - 0.5


@pytest.mark.parametrize("chunk_size", [1, 7, 18, 512])
def test_weights_are_factors_of_each_tokens_loss(chunk_size: int) -> None:
    hidden, weight, labels = make_inputs()
    weights = weights_of_tokens()
    loss = linear_cross_entropy(hidden, weight, labels, chunk_size, token_weights=weights)
    each = F.cross_entropy(hidden @ weight.t(), labels, ignore_index=-100, reduction="none")
    expected = (each * weights).sum()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-6)
    for grad, expected_grad in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(grad, expected_grad, atol=1e-5, rtol=1e-5)


def test_the_loss_of_each_token_has_no_gradients() -> None:
    hidden, weight, labels = make_inputs()
    with Largest() as seen:
        each = linear_cross_entropy(hidden, weight, labels, 4, reduction="none")
    assert not each.requires_grad and seen.elements == 4 * V
    expected = F.cross_entropy(hidden @ weight.t(), labels, ignore_index=-100, reduction="none")
    torch.testing.assert_close(each, expected, atol=1e-6, rtol=1e-6)
    assert not each[labels == -100].any()


@pytest.mark.parametrize("weights", [None, weights_of_tokens()], ids=["plain", "weighted"])
def test_labels_on_a_device_are_masked_to_the_same_numbers(weights: Tensor | None, monkeypatch) -> None:
    def measure() -> list[Tensor]:
        hidden, weight, labels = make_inputs()
        each = linear_cross_entropy(hidden, weight, labels, 5, token_weights=weights, reduction="none")
        value = linear_cross_entropy(hidden, weight, labels, 5, token_weights=weights)
        return [each, value.detach(), *torch.autograd.grad(value, (hidden, weight))]

    expected = measure()
    monkeypatch.setattr(loss, "select_tokens", loss.mask_tokens)
    for found, truth in zip(measure(), expected, strict=True):
        torch.testing.assert_close(found, truth, atol=1e-6 * float(truth.abs().max()), rtol=0)
    hidden, weight, labels = make_inputs()
    for label in (V, -1):
        labels[3] = label
        assert linear_cross_entropy(hidden, weight, labels).isnan(), "it cannot be named, and must not pass"


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_no_device_is_read(device: str) -> None:
    """Reading a meta tensor raises. Labels may lie on the CPU, where reading them waits for nothing."""
    hidden, weight = (x.detach().to("meta").requires_grad_() for x in make_inputs()[:2])
    labels = make_inputs()[2].to(device)
    linear_cross_entropy(hidden, weight, labels, 5, token_weights=weights_of_tokens().to(device)).backward()
    assert hidden.grad.shape == (N, W) and weight.grad.shape == (V, W)
    assert linear_cross_entropy(hidden, weight, labels, 5, reduction="none").shape == (N,)
