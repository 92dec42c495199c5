import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trl.trainer.utils import entropy_from_logits

from sightline.hf.chunked_logits import ChunkedLogits

B, S, W, V = 2, 300, 8, 23  # more tokens than a chunk


def make(dtype: torch.dtype = torch.float32) -> tuple[ChunkedLogits, Tensor]:
    """Return logits in chunks, and the same as a tensor."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in ((B, S, W), (V, W), (V,))
    )
    return ChunkedLogits(hidden, weight, bias), F.linear(hidden, weight, bias)


LABELS = torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(1))
LABELS[0, :7] = -100

IN_CHUNKS: dict[str, Callable[[Any], Any]] = {
    "size": lambda x: torch.tensor([*x.shape, x.dim(), x.ndim, x.size(-1), x.numel(), len(x), x.size()[0]]),
    "argmax": lambda x: x[..., :-1, :].contiguous().argmax(dim=-1),
    "last token, in a new dimension": lambda x: x[:, None, -1:, :][()][..., :, :].argmax(-1),
    "argmax of masked tokens": lambda x: x[LABELS != -100].argmax(-1, keepdim=True),
    "max under no_grad": torch.no_grad()(lambda x: torch.amax(x, dim=2)),
    "soft cap": lambda x: (torch.tanh(x / 3.0) * 3.0).argmax(-1),
    "negative scale": lambda x: (-2 * x + 1).float().argmax(-1),
    "entropy of TRL": torch.no_grad()(entropy_from_logits),
    "loss of flat tokens": lambda x: F.cross_entropy(x.view(-1, V), LABELS.view(-1)),
    "loss of flat tokens, size given": lambda x: F.cross_entropy(x.reshape((B * S, -1)), LABELS.view(-1)),
    "loss of masked tokens": lambda x: F.cross_entropy(x[LABELS != -100], LABELS[LABELS != -100], reduction="sum"),
    "loss of a row": lambda x: torch.nn.CrossEntropyLoss()(x[1, 5:].contiguous(), LABELS[1, 5:]),
    "loss of a flattened part": lambda x: F.cross_entropy(x[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten()),
    "loss of each row": lambda x: sum(F.cross_entropy(row, labels) for row, labels in zip(x, LABELS, strict=True)),
    "loss of parts": lambda x: sum(
        F.cross_entropy(part, labels)
        for part, labels in zip(x.view(-1, V).split(77), LABELS.view(-1).split(77), strict=True)
    ),
}
AS_TENSOR: dict[str, Callable[[Any], Any]] = {
    "loss of each token": lambda x: F.cross_entropy(x.view(-1, V), LABELS.view(-1), reduction="none").sum(),
    "smoothed labels": lambda x: F.cross_entropy(x.view(-1, V), LABELS.view(-1), label_smoothing=0.1),
    "log-softmax": lambda x: F.log_softmax(x, dim=-1).sum(),
    "logsumexp with gradients": lambda x: x.logsumexp(-1).sum(),
    "sum of squares": lambda x: (x**2).sum(),
    "scale of each token": lambda x: (x * torch.linspace(0, 1, V)).sum(),
    "numpy's name of dim": lambda x: x.amax(axis=-1).sum(),
    "a new last dimension": lambda x: x[..., None].sum(),
    "mask of logits": lambda x: x[torch.ones(B, S, V, dtype=torch.bool)].sum(),
    "part of the vocabulary": lambda x: x[..., :5].sum(),
    "an index of the vocabulary": lambda x: x[:, :, 3].sum(),
    "transposed loss": lambda x: F.cross_entropy(x.transpose(1, 2), LABELS),
    "mean over tokens": lambda x: x.mean(dim=1).exp().sum(),
}


@pytest.mark.parametrize("name", IN_CHUNKS)
def test_in_chunks_equals_tensor(name: str) -> None:
    chunked, plain = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result, expected = IN_CHUNKS[name](chunked), IN_CHUNKS[name](plain)
    assert_equal_with_gradients(chunked, plain, result, expected)


@pytest.mark.parametrize("name", AS_TENSOR)
def test_everything_else_equals_tensor_and_warns(name: str) -> None:
    chunked, plain = make()
    with pytest.warns(UserWarning, match=r"needs the logits of all tokens.*sightline\.hf\.enable\(model, fused_loss"):
        result = AS_TENSOR[name](chunked)
    assert_equal_with_gradients(chunked, plain, result, AS_TENSOR[name](plain))


def assert_equal_with_gradients(chunked: ChunkedLogits, plain: Tensor, result: Tensor, expected: Tensor) -> None:
    assert result.dtype == expected.dtype and result.requires_grad == expected.requires_grad
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    if expected.requires_grad:
        leaves = (chunked.hidden, chunked.weight, chunked.bias)
        for grad, wanted in zip(
            torch.autograd.grad(result, leaves), torch.autograd.grad(expected, leaves), strict=True
        ):
            assert (grad - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("change", ["item", "method"])
def test_change_in_place_reaches_the_loss(change: str) -> None:
    """Some models set the logits of tokens of images to -inf before the loss."""
    chunked, plain = make()
    losses = []
    for logits in (chunked, plain.clone()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if change == "item":
                logits[:, :, LABELS[0, 7]] = -10.0
            else:
                logits.mul_(2)
        losses.append(F.cross_entropy(logits.view(-1, V), LABELS.view(-1)))
    torch.testing.assert_close(*losses)
    assert not torch.allclose(losses[0], F.cross_entropy(plain.view(-1, V), LABELS.view(-1)))


def test_few_tokens_do_not_warn() -> None:
    chunked, plain = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(F.log_softmax(chunked[0, -5:], dim=-1), F.log_softmax(plain[0, -5:], dim=-1))


def test_dtype_and_detach() -> None:
    chunked, plain = make(torch.bfloat16)
    assert chunked.dtype == torch.bfloat16 and chunked.float().dtype == chunked.to(torch.float32).dtype == torch.float32
    assert chunked.to("cpu").dtype == torch.bfloat16 and chunked.to(plain.float()).dtype == torch.float32
    assert chunked.requires_grad and not chunked.detach().requires_grad
    assert torch.equal(torch.stack([chunked[0].materialize(), chunked[1].materialize()]), plain)
    expected = F.cross_entropy(plain.float().view(-1, V), LABELS.view(-1))
    torch.testing.assert_close(
        F.cross_entropy(chunked.float().view(-1, V), LABELS.view(-1)), expected, rtol=1e-3, atol=0
    )


def test_logits_after_an_optimizer_step_are_refused() -> None:
    chunked, _ = make()
    with torch.no_grad():
        chunked.weight += 1
    with pytest.raises(RuntimeError, match="weight of the output head has changed"):
        chunked.argmax(-1)


def test_attributes_that_tensors_lack() -> None:
    with pytest.raises(AttributeError, match="no attribute 'logits'"):
        make()[0].logits  # noqa: B018
