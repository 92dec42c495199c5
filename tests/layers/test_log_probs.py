from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sightline.layers.log_probs import LogProbs, linear_log_probs

N, W, V = 40, 16, 41
TRANSFORMS: dict[str, Callable[[Tensor], Tensor] | None] = {
    "none": None,
    "soft cap and temperature": lambda logits: torch.tanh(logits / 3) * 3 / 0.7,
    "last function saves its output": lambda logits: torch.tanh(logits),
}


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((N, W), (V, W), (V,)))
    return hidden, weight, bias, torch.randint(0, V, (N,))


def reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, transform: Callable[[Tensor], Tensor] | None
) -> LogProbs:
    logits = F.linear(hidden, weight, bias)
    logits = logits if transform is None else transform(logits)
    log_probs = logits.log_softmax(dim=1)
    entropy = -(log_probs.exp() * log_probs).sum(dim=1)
    return LogProbs(log_probs.gather(1, labels[:, None]).squeeze(1), entropy, logits.argmax(dim=1) == labels)


@pytest.mark.parametrize("chunk_size", [1, 7, 39, 40, 512])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("used", ["log_probs", "entropy", "both"])
def test_equals_log_softmax(name: str, used: str, chunk_size: int) -> None:
    hidden, weight, bias, labels = make_inputs(torch.float64)
    found = linear_log_probs(hidden, weight, labels, chunk_size, bias=bias, transform=TRANSFORMS[name])
    expected = reference(hidden, weight, bias, labels, TRANSFORMS[name])
    torch.testing.assert_close(found, expected)
    assert found.is_top1.any() and not found.is_top1.all() and not found.is_top1.requires_grad
    factors = torch.randn(2, N, dtype=torch.float64)
    factors[:, 3:9] = 0  # tokens without a gradient
    grads = []
    for result in (found, expected):
        total = hidden.sum() * 0
        if used != "entropy":
            total = total + (result.log_probs * factors[0]).sum()
        if used != "log_probs":
            total = total + (result.entropy * factors[1]).sum()
        grads.append(torch.autograd.grad(total, (hidden, weight, bias)))
    torch.testing.assert_close(*grads)


def test_float32_and_half_precision() -> None:
    hidden, weight, bias, labels = make_inputs()
    exact = reference(hidden.double(), weight.double(), bias.double(), labels, None)
    found = linear_log_probs(hidden, weight, labels, 7, bias=bias)
    torch.testing.assert_close(found.log_probs.double(), exact.log_probs, atol=1e-5, rtol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half = linear_log_probs(hidden, weight, labels, 7, bias=bias)
    assert half.log_probs.dtype == half.entropy.dtype == torch.float32
    torch.testing.assert_close(half.log_probs.double(), exact.log_probs, atol=0.1, rtol=0.01)
    half.log_probs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == bias.grad.dtype == torch.float32
    wanted = torch.autograd.grad(exact.log_probs.sum(), (hidden, weight, bias))
    for tensor, grad in zip((hidden, weight, bias), wanted, strict=True):
        assert (tensor.grad - grad).norm() <= 0.02 * grad.norm()


def test_frozen_weight_and_no_gradients() -> None:
    hidden, weight, _, labels = make_inputs()
    expected = reference(hidden, weight, None, labels, None)
    found = linear_log_probs(hidden, weight.detach(), labels, 7)
    wanted = torch.autograd.grad(expected.log_probs.sum(), hidden)
    torch.testing.assert_close(torch.autograd.grad(found.log_probs.sum(), hidden), wanted, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.equal(linear_log_probs(hidden, weight, labels, 7).log_probs, found.log_probs)


def test_logits_of_all_tokens_never_exist() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            tensors = [x for x in (result if isinstance(result, tuple) else [result]) if isinstance(x, Tensor)]
            self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
            return result

    hidden, weight, bias, labels = make_inputs()
    with Largest() as largest:
        linear_log_probs(hidden, weight, labels, 20, bias=bias).log_probs.sum().backward()
    assert largest.elements == 20 * V
